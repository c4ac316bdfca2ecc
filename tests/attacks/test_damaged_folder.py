"""Grid folders of an earlier release without syncs, damaged by a power cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchlab.cli.doctor import Finding, Level, examine
from batchlab.runtime.home import Home
from tests.support.grid.local_grid import LocalGrid

pytestmark = pytest.mark.slow

JOB = """\
name: copies
input: {files: items.txt, split: lines}
stages: [{name: copy, command: ["cp", "{input}", "{output:copied}"]}]
"""


def write_job(folder: Path) -> Path:
    (folder / "items.txt").write_text("a\nb\n")
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


def test_a_job_runs_again_after_a_power_cut_has_emptied_its_objects(tmp_path: Path) -> None:
    """Before, the ledger had lost the job, the job's objects were empty, and the job could never run again."""
    path = write_job(tmp_path)
    grid = LocalGrid(tmp_path / "grid")
    view = grid.run(path)
    grid.stop()
    objects = [one for one in grid.home.objects.rglob("*") if one.is_file()]
    assert [one for one in objects if one.name == "spec.json"]
    for one in objects:
        one.write_bytes(b"")
    for one in grid.home.path.glob("ledger.sqlite*"):
        one.unlink()
    again = LocalGrid(tmp_path / "grid")
    try:
        assert again.client.jobs() == []
        repeated = again.run(path)
        assert (repeated["id"], repeated["state"]) == (view["id"], "SUCCEEDED")
    finally:
        again.stop()


@pytest.mark.parametrize("content", [b"", b'{"v": 1, "torn', b"\0" * 512])
def test_doctor_names_a_damaged_object_and_moves_it(tmp_path: Path, content: bytes) -> None:
    """Before, `doctor` did not report such a folder."""
    home = Home(tmp_path / "grid")
    home.make()
    for key in ("jobs/j-1/spec.json", f"code/{'0' * 64}.zip"):
        (home.objects / key).parent.mkdir(parents=True)
        (home.objects / key).write_bytes(content)
    (home.objects / "jobs/j-1/control.json").write_bytes(b"{}")

    def findings(*, repair: bool = False) -> list[Finding]:
        return [one for one in examine(home, "local", repair=repair) if one.about == "objects"]

    named = findings()
    assert {one.level for one in named} == {Level.FAIL}
    assert [one.text for one in named if "spec.json" in one.text]
    assert [one.text for one in named if ".zip" in one.text]
    assert "--repair" in named[-1].remedy
    assert (home.objects / "jobs/j-1/spec.json").exists()
    assert [finding.level for finding in findings(repair=True)] == [Level.WARN]
    assert (home.damaged / "jobs/j-1/spec.json").read_bytes() == content
    assert not (home.objects / "jobs/j-1/spec.json").exists()
    assert (home.objects / "jobs/j-1/control.json").exists()
    assert [finding.level for finding in findings()] == [Level.OK]
