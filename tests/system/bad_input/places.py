"""Folders, files, and addresses with which a grid cannot start.

Each scene is prepared in the user's folder, which is next to the future home of the grid.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.system.bad_input.case import Case, nothing

RUN = ("run", "job.yaml")
NOBODY = "http://127.0.0.1:9"
PASSWORD = "correct-horse-battery"


def home(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Return a function that creates a file in the home, or a folder if the content is None."""

    def make(folder: Path) -> None:
        path = folder.parent / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)

    return make


def newer_ledger(folder: Path) -> None:
    home("ledger.sqlite", b"")(folder)
    path = folder.parent / "home/ledger.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('9999')")


GARBAGE = b"somebody's letter, no database. " * 300

PLACES = [
    Case(
        "home a file",
        "has a file where the grid's folder should be",
        "home cannot be written: Not a directory",
        home("", b""),
        RUN,
    ),
    Case(
        "home below a file",
        "names a folder inside of a file",
        "cannot be written: Not a directory",
        nothing,
        (*RUN, "--home", "job.yaml/home"),
    ),
    Case(
        "read-only",
        "names a folder where nobody can write",
        "The grid's folder /proc/grid cannot be written",
        nothing,
        (*RUN, "--home", "/proc/grid"),
    ),
    Case("list in a file", "asks for the jobs of a file", "No grid is up in", home("", b""), ("job", "list"), 3),
    Case(
        "objects a file",
        "has a file in place of the bucket",
        "home/objects cannot be written",
        home("objects", b""),
        RUN,
    ),
    Case(
        "scratch a file",
        "has a file in place of the workers' folder",
        "home/scratch cannot be written",
        home("scratch", b""),
        RUN,
    ),
    Case(
        "newer ledger",
        "has a ledger of a newer version",
        "was written by a newer batchlab (schema 9999). Install that version",
        newer_ledger,
        RUN,
        3,
    ),
    Case(
        "damaged ledger",
        "has a ledger that is damaged",
        "file is not a database. Move the file away and start the grid again",
        home("ledger.sqlite", GARBAGE),
        RUN,
        3,
    ),
    Case(
        "damaged queue",
        "has a queue file that is damaged",
        "Move the file away and start the grid again. The manager sends its messages again",
        home("queue.sqlite", GARBAGE),
        RUN,
        3,
    ),
    Case(
        "damaged fleet",
        "has a damaged record of its workers",
        "Move fleet/groups.json out of the grid's folder",
        home("fleet/groups.json", b""),
        RUN,
        3,
    ),
    Case("empty token", "has an empty token", "is empty. Delete it while the grid is down", home("token", b""), RUN, 3),
    Case(
        "no emulator",
        "names an endpoint at which nobody listens",
        "No service answers at http://127.0.0.1:9",
        nothing,
        (*RUN, "--backend", "ministack", "--endpoint", NOBODY),
        3,
    ),
    Case(
        "password",
        "writes a password into the endpoint",
        "The endpoint 'http://…@127.0.0.1:9' is not a URL",
        nothing,
        (*RUN, "--backend", "ministack", "--endpoint", f"http://me:{PASSWORD}@127.0.0.1:9"),
    ),
]
