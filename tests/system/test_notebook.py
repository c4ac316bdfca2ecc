"""The tutorial notebook, whose cells run in order in a real kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.grid.local_grid import processes_of
from tests.support.waiting import until

NOTEBOOK = ROOT / "docs" / "tutorial-notebook.ipynb"

RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
# The first cell runs twice, as a user may run it.
notebook.cells.insert(2, nbformat.v4.new_code_cell(notebook.cells[1].source))
NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, "executed.ipynb")
"""


def test_cells_of_the_tutorial_run_in_order(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")}
    environment = {**os.environ, **folders, "BATCHLAB_HOME": str(tmp_path / "home")}
    # nbclient runs in a process of its own, because it leaves warnings and an event loop behind.
    command = [sys.executable, "-c", RUN, str(NOTEBOOK)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-4000:]
    executed = json.loads((tmp_path / "executed.ipynb").read_text())
    printed = [output for cell in executed["cells"] for output in cell.get("outputs", ())]
    text = "".join("".join(output.get("text", ())) for output in printed)
    assert "simulate: 40 of 40 tasks" in text
    assert "40 years, between" in text
    assert "1 ZeroDivisionError('division by zero')" in text
    assert "[map/0] computes the premium with a loading of" in text
    assert "[0.1, 0.2, 0.3]" in text
    assert "Warning" not in text
    until(lambda: not processes_of(tmp_path / "home"))


def test_notebook_is_stored_without_outputs() -> None:
    notebook: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
