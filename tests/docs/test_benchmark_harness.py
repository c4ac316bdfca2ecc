"""The benchmarks against the peers, which name their harness or report that it is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

BENCHMARKS = ROOT / "benchmarks"

REGISTRY = """
PEERS = {}

def venv_of(name):
    return "main"

def needs(name):
    return set()
"""
HARNESS = """
import json, sys
from pathlib import Path
import adapters

asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
peer = asked["--peer"]
assert adapters.PEERS[peer][0] == "batchlab_peer"
assert (Path(adapters.__file__).parent / "batchlab_peer.py").is_file()
venv = Path(asked["--venvs"]) / ("v_" + adapters.venv_of(peer))
assert (venv / "bin" / "python").exists()
print("asked", json.dumps(asked))
figures = {"per_s": 1234.4} if "--scale" in asked else {}
Path(asked["--json"]).write_text(json.dumps({"runs": {peer: {"W1": {"median": figures}}}}))
sys.exit(0 if "--scale" in asked else 7)
"""


def ran(program: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / program), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Write a fake harness with the required files."""
    folder = tmp_path / "made"
    (folder / "adapters").mkdir(parents=True)
    (folder / "run.py").write_text(HARNESS)
    (folder / "adapters" / "__init__.py").write_text(REGISTRY)
    (folder / "adapters" / "base.py").touch()
    return folder


@pytest.mark.parametrize("program", ["run.py", "peers.py", "gate.py"])
def test_missing_harness_is_reported_first(program: str, tmp_path: Path) -> None:
    more = ("--install", "--venvs", tmp_path / "venvs") if program == "peers.py" else ()
    done = ran(program, "--harness", tmp_path / "none", *more)
    assert done.returncode == 1
    assert done.stderr.startswith(f"There is no harness in {tmp_path / 'none'}: it has no run.py")
    assert "is no part of this repository" in done.stderr
    assert "--harness FOLDER; docs/benchmarks.md says" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "venvs").exists()


def test_incomplete_folder_is_refused(made: Path) -> None:
    (made / "adapters" / "base.py").unlink()
    done = ran("run.py", "--harness", made)
    assert done.returncode == 1
    assert "it has no adapters/base.py." in done.stderr


@pytest.mark.parametrize("program", ["run.py", "peers.py", "gate.py"])
def test_help_describes_the_harness(program: str) -> None:
    told = " ".join(ran(program, "--help").stdout.split())
    assert "--harness FOLDER" in told
    assert "is no part of this repository" in told
    assert "docs/benchmarks.md says what a harness has to have" in told


def test_batchlab_joins_a_harness_of_that_form(made: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    results = tmp_path / "results.json"
    words = ("--small", "--peers", "batchlab_local", "--venvs", tmp_path / "venvs")
    done = ran("peers.py", "--harness", made, *words, "--json", results)
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("asked ")]
    asked = json.loads(said.removeprefix("asked "))
    assert (asked["--workload"], asked["--repeat"], asked["--scale"]) == ("all", "1", "0.1")
    assert asked["--json"] == str(results)
    assert "| batchlab, `local` | 1,234/s | – |" in done.stdout
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


def test_a_harness_that_fails_ends_them_with_its_code(made: Path, tmp_path: Path) -> None:
    words = ("--peers", "batchlab_local", "--venvs", tmp_path, "--json", tmp_path / "results.json")
    done = ran("peers.py", "--harness", made, *words)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
