"""Problems of a running grid: a full disk, a clock that is set back, and a second grid."""

from __future__ import annotations

import fcntl
import json
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import mounts
from tests.system.bad_input import jobs
from tests.system.bad_input.case import check, put, swap
from tests.system.bad_input.shell import Shell
from tests.system.bad_input.trial import fetched

RUN = ("run", "job.yaml", "--out", "out")
DISK_BYTES = 24 << 20
DAY_S = 86_400


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Return a shell in a folder with a valid job."""
    jobs.sound(tmp_path / "job")
    return Shell(tmp_path, tmp_path / "job")


def test_held_lock_is_reported(shell: Shell) -> None:
    """The lock is held by another manager that is starting, or by a copy of the folder on a shared disk."""
    shell.home.mkdir()
    with (shell.home / "manager.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check(shell(*RUN), code=3, says="A manager is already running in")


def test_occupied_port_is_reported(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = shell("manager", "--port", str(port))
    check(told, code=2, says=f"cannot listen on 127.0.0.1:{port}: Address already in use")


def test_results_that_find_no_folder_are_not_lost(shell: Shell) -> None:
    (shell.folder / "out").write_text("somebody's file")
    told = shell(*RUN)
    check(told, code=2, says="The results cannot be written to out")
    assert (shell.folder / "out").read_text() == "somebody's file"
    (shell.folder / "out").unlink()
    told = shell(*RUN, "--resume")
    check(told, code=0, says="SUCCEEDED")
    assert "No earlier run has this file, code, and data" in told.err
    assert fetched(shell.folder / "out") == {"one": [1, 2, 3]}


# --- A full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_scratch(shell: Shell) -> Iterator[Path]:
    """Mount a separate file system for the workers' scratch folder. The mount needs root."""
    with mounts.small_disk(shell.home / "scratch", DISK_BYTES) as folder:
        yield folder


FILLS = """\
def size(item):
    return item.size

def fill(sizes, ctx):
    with (ctx.scratch / "big").open("wb") as file:
        while True:
            file.write(bytes(1 << 20))

def again(sizes, ctx):
    return ctx.scratch.joinpath("big").write_bytes(bytes(16 << 20))
"""


def test_a_full_scratch_fails_the_task_that_filled_it(shell: Shell, small_scratch: Path) -> None:
    """The first stage has a part that is larger than the disk, the second one writes until the disk is full, and the
    third one has room again."""
    put("work.py", FILLS)(shell.folder)
    put(jobs.ITEMS, b"x" * (DISK_BYTES + 1) + b"\nsmall\n")(shell.folder)
    swap("split: items}", "split: lines, size: 1}\nfailure: {max_failures: 2}")(shell.folder)
    swap("work:one", "work:size")(shell.folder)
    with (shell.folder / "job.yaml").open("a") as file:
        file.write("  - {name: fill, python: 'work:fill', gather: all, retry: 1}\n")
        file.write("  - {name: again, python: 'work:again', gather: all, retry: 1}\n")
    told = shell(*RUN, "--json", "--keep-up")
    failures = {(load["stage"], load["task"]): load["reason"] for load in json.loads(told.out)["failures"]}
    assert shell("job", "results", "last", "--stage", "one", "--out", "one").code == 0
    assert shell("grid", "down").code == 0
    assert told.code == 0, told
    assert "does not fit on the worker: No space left on device" in failures["one", 0]
    assert "No space left on device" in failures["fill", 0]
    assert fetched(shell.folder / "one") == {"one": [6]}
    assert fetched(shell.folder / "out")["again"] == [16 << 20]


# --- A clock that is set back --------------------------------------------------------------------


def later(path: Path, table: str, *columns: str) -> None:
    """Move the times in `table` forward by a day. For a reader, the clock has then been set back by a day."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for column in columns:
            connection.execute(f"UPDATE {table} SET {column} = {column} + {DAY_S}")


def test_a_clock_that_went_back_a_day_costs_no_day(shell: Shell) -> None:
    """A task that was due today is done today and only once."""
    put("work.py", "import time\ndef one(item):\n    time.sleep(0.2)\n    return item\n")(shell.folder)
    put(jobs.ITEMS, "".join(f"{i}\n" for i in range(40)))(shell.folder)
    assert shell("grid", "up", "--pool", "default:0-2x1").code == 0
    job = shell("job", "submit", "job.yaml").out.strip()
    while not any(shell.home.glob("objects/jobs/*/one/outcomes/*/*.json")):
        assert shell("job", "why", job).code == 0
    assert shell("grid", "down").code == 0
    later(shell.home / "queue.sqlite", "messages", "visible_s", "sent_s", "received_s")
    check(shell(*RUN, "--resume"), code=0, says="SUCCEEDED")
    assert fetched(shell.folder / "out") == {"one": list(range(40))}
