"""Commands that read the jobs of a grid that is not up, from the ledger and the bucket in its folder."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from batchlab.cli.folder_client import FolderClient, open_folder
from batchlab.core.errors import Unreachable
from batchlab.core.ports import Ledger
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from tests.support.cli import Run
from tests.support.server.api import Rig, job


@pytest.fixture(scope="module")
def down(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, str, str]:
    """Return the folder of a grid that was up, with a failed job and a job that has not ended."""
    home = Home(tmp_path_factory.mktemp("grid"))
    with Rig(home=home) as rig:
        failed = rig.submit(job("sums"))
        rig.work(failed, 4, bad=(1, 3))
        rig.ended(failed)
        active = rig.submit(job("tots", "other"))
        rig.outstanding(active, 4)
    return home, failed, active


@pytest.fixture(autouse=True)
def _here(down: tuple[Home, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHLAB_HOME", str(down[0].path))


def rows(home: Home) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(home.ledger_file)) as connection:
        return connection.execute("SELECT id, state, round FROM jobs").fetchall()


def test_jobs_are_listed_with_a_note_about_the_grid(run: Run, down: tuple[Home, str, str]) -> None:
    home, failed, active = down
    code, out, err = run("job", "list")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[active, "RUNNING"], [failed, "FAILED"]] or out
    assert err.startswith(f"No grid is up in {home.path}. `batchlab grid up` starts a grid")
    code, out, err = run("job", "list", "--json")
    assert (code, err) == (0, "")
    assert [view["id"] for view in json.loads(out)] == [active, failed]


def test_failed_job_is_shown_with_its_failures_and_logs(run: Run, down: tuple[Home, str, str]) -> None:
    _, failed, _ = down
    code, out, err = run("job", "show", "sums")
    assert (code, err) == (0, "")
    assert "FAILED" in out
    assert "to go" not in out
    code, out, _ = run("job", "failures", "sums", "--each")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["map/1", "map/3"]
    code, out, _ = run("job", "failures", failed, "--json")
    assert (code, [group["count"] for group in json.loads(out)]) == (0, [2])
    code, out, _ = run("job", "logs", failed, "map/3")
    assert (code, out) == (0, "--- map/3\ntask 3, try 1\n")
    code, out, _ = run("job", "why", "sums")
    assert code == 0
    assert "The job ended FAILED" in out
    assert "task 1, try 1" in out
    code, out, _ = run("job", "show", "sums", "map/3", "--json")
    assert code == 0
    assert json.loads(out)["attempts"][0]["state"] == "FAILED"


def test_results_of_the_succeeded_tasks_are_fetched(run: Run, tmp_path: Path) -> None:
    code, out, err = run("job", "results", "sums", "--out", tmp_path / "out")
    assert code == 0, err
    assert "2 results" in out
    values = [json.loads(line)["value"] for line in (tmp_path / "out" / "map.jsonl").read_text().splitlines()]
    assert values == [0, 2]


def test_job_that_has_not_ended_waits_for_a_grid(run: Run, down: tuple[Home, str, str]) -> None:
    home, _, active = down
    code, out, _ = run("job", "show", "last")
    assert code == 0
    assert active in out
    assert f"No grid is up in {home.path}. `batchlab grid up` starts a grid, which continues the job." in out
    assert "unknown: no grid is up" in out


@pytest.mark.parametrize(
    "command",
    [
        ("job", "cancel", "last"),
        ("job", "pause", "last"),
        ("job", "resume", "last"),
        ("job", "retry", "sums"),
        ("job", "delete", "sums", "--yes"),
        ("job", "cap", "last", "5USD"),
        ("job", "watch", "last"),
        ("job", "logs", "last", "--follow"),
        ("grid", "status"),
        ("grid", "workers"),
        ("schedule", "list"),
        ("notify", "list"),
    ],
)
def test_other_commands_need_a_grid(run: Run, down: tuple[Home, str, str], command: tuple[str, ...]) -> None:
    before = rows(down[0])
    code, out, err = run(*command)
    assert (code, out) == (3, "")
    assert err.startswith(f"Error: No grid is up in {down[0].path}.\n  Start one with `batchlab grid up`")
    assert rows(down[0]) == before


def test_ledger_is_only_read(down: tuple[Home, str, str]) -> None:
    client = open_folder(down[0])
    assert client is not None
    with client:
        assert client.jobs(limit=1)
        assert client._ledger is not None
        with pytest.raises(Unreachable, match="readonly"):
            client._runner.run(client._ledger.forget())


def files_of(home: Home) -> dict[str, tuple[int, int]]:
    """Return the size and the time of the last change of each file and folder of the home."""
    found = {str(path.relative_to(home.path)): path.stat() for path in home.path.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def test_commands_that_read_do_not_change_the_folder(run: Run, down: tuple[Home, str, str]) -> None:
    home, failed, _ = down
    (home.path / ".gitignore").unlink(missing_ok=True)
    before = files_of(home)
    for command in (("list",), ("show", failed), ("failures", failed), ("why", failed), ("logs", failed, "map/3")):
        assert run("job", *command)[0] == 0
        assert files_of(home) == before, command


def test_read_of_one_grid_does_not_change_which_grid_was_up_last(tmp_path: Path) -> None:
    home = Home(tmp_path / "two")
    for number, backend in enumerate(("local", "ministack")):
        ledger = factory.load(backend).open_ledger(home)
        asyncio.run(read_and_close(ledger))
        path = factory.load(backend).ledger_in(home)
        assert path
        os.utime(path, (number, number))
    assert name_of(open_folder(home)) == "ministack"
    client = open_folder(home, "local")
    assert client
    with client:
        assert client.jobs(limit=1) == []
    assert name_of(open_folder(home)) == "ministack"


async def read_and_close(ledger: Ledger) -> None:
    assert not await ledger.jobs(limit=1)
    await ledger.close()


def name_of(client: FolderClient | None) -> str:
    assert client
    with client:
        return client.backend.name


def test_ledger_that_a_killed_manager_left_with_its_log_is_read(down: tuple[Home, str, str], tmp_path: Path) -> None:
    home = Home(tmp_path / "killed")
    shutil.copytree(down[0].path, home.path)
    with closing(sqlite3.connect(home.ledger_file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("UPDATE jobs SET state = 'CANCELLED' WHERE id = ?", (down[1],))
        connection.commit()
        shutil.copytree(home.path, tmp_path / "copy")
    client = open_folder(Home(tmp_path / "copy"))
    assert client
    with client:
        assert client.job(down[1])["state"] == "CANCELLED"


def test_ledger_of_an_older_release_is_not_migrated(run: Run, tmp_path: Path) -> None:
    home = Home(tmp_path / "old")
    home.make()
    with closing(sqlite3.connect(home.ledger_file)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
    code, _, err = run("job", "list", "--home", home.path)
    assert code == 3
    assert "was written by an older batchlab" in err
    assert "`batchlab grid up`" in err


def test_folder_without_a_ledger_has_no_jobs(run: Run, tmp_path: Path) -> None:
    code, _, err = run("job", "list", "--home", tmp_path)
    assert code == 3
    assert f"No grid is up in {tmp_path}" in err
    assert not list(tmp_path.iterdir()), "a command that reads must not create files"
