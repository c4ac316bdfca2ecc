"""The folder of a grid, which other users of the machine cannot read."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from batchlab.runtime.home import Home
from tests.support.grid.local_grid import LocalGrid

JOB = """\
name: secret
params: {password: "{{ word }}"}
input: {files: items.txt, split: lines}
stages: [{name: copy, command: ["sh", "-c", "cat {input} >{output:copied}"]}]
"""


def readable_by_others(folder: Path) -> list[str]:
    """Return the entries of the folder, including the folder itself, that the group or others may access."""
    found = []
    for path in (folder, *folder.rglob("*")):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # a worker has removed its scratch folder meanwhile
            continue
        if not stat.S_ISLNK(mode) and mode & (stat.S_IRWXG | stat.S_IRWXO):
            found.append(f"{path.relative_to(folder)} {stat.filemode(mode)}")
    return found


def write_job(folder: Path) -> Path:
    (folder / "items.txt").write_text("a\nb\n")
    (folder / "job.yaml").write_text(JOB.replace('"{{ word }}"', "hunter2"))
    return folder / "job.yaml"


@pytest.mark.slow
def test_other_users_cannot_read_the_folder_of_a_grid(tmp_path: Path) -> None:
    """After a job has run, only the user can read the job's parameters, its input, and the ledger."""
    grid = LocalGrid(tmp_path / "grid")
    try:
        view = grid.run(write_job(tmp_path))
        assert view["state"] == "SUCCEEDED"
        assert stat.S_IMODE((tmp_path / "grid").stat().st_mode) == 0o700
        others = readable_by_others(tmp_path / "grid")
        # The home folder is private, and each subfolder with a job's data is private too.
        closed = (".sqlite", "token", "manager.log", ".json")
        named = [other for other in others if other.split()[0].endswith(closed)]
        objects = [p for p in (tmp_path / "grid" / "objects").rglob("*") if p.is_file()]
        assert objects
        assert named == []
        assert {stat.S_IMODE(path.stat().st_mode) for path in objects} == {0o600}
    finally:
        grid.stop()


@pytest.mark.slow
def test_downloaded_results_have_the_usual_permissions(tmp_path: Path) -> None:
    """The permissions of results outside of the grid's folder follow the user's umask."""
    grid = LocalGrid(tmp_path / "grid")
    try:
        view = grid.run(write_job(tmp_path))
        grid.results(view, tmp_path / "out")
    finally:
        grid.stop()
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    fetched = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert fetched
    assert {stat.S_IMODE(path.stat().st_mode) for path in fetched} == {usual}


def test_an_older_grid_is_closed_at_its_next_start(tmp_path: Path) -> None:
    """In release 0.1.0, the folder had mode 0755 and its files 0644."""
    home = Home(tmp_path / ".batchlab")
    home.make()
    for name in ("ledger.sqlite", "queue.sqlite-wal", "manager.log", "notify.toml"):
        (home.path / name).touch(0o644)
    for name in ("objects", "fleet"):
        (home.path / name).mkdir()
    for path in (home.path, *home.path.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with home.lock():
        assert readable_by_others(home.path) == []


def test_folder_with_other_files_keeps_its_permissions(tmp_path: Path) -> None:
    """A grid in a folder with other files protects only its own files. The option `--home .` must not change the
    permissions of the user's project."""
    project = tmp_path / "project"
    project.mkdir(0o755)
    (project / "notes.txt").touch(0o644)
    home = Home(project)
    for _ in range(2):
        with home.lock():
            home.token()
    assert stat.S_IMODE(project.stat().st_mode) == 0o755
    assert readable_by_others(project) == [". drwxr-xr-x", "notes.txt -rw-r--r--"]
