"""`batchlab doctor`: checks of this machine and of the grid's folder.

Each check tries the feature itself, because a version number is not a proof.

Invariant: checks leave nothing behind, and a check cannot make another one fail.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli import output
from batchlab.cli.doctor_backends import Finding, Level, backend_findings
from batchlab.cli.options import BackendOption, EndpointOption, HomeOption, JsonOption, home_of
from batchlab.core import optional_dependencies
from batchlab.core.errors import BatchlabError
from batchlab.runtime.home import Home

PYTHON = (3, 11)
SQLITE = (3, 35)
"""First SQLite version with RETURNING, which a fold of the ledger uses."""
FAIL_BELOW_BYTES = 200 * 2**20
WARN_BELOW_BYTES = 2 * 2**30
SANE_S = 1_700_000_000.0
SKEW_S = 2.0
MOST_NAMED = 20
"""Most damaged objects that are listed."""


def register(root: typer.Typer) -> None:
    """Add the command `doctor` to the root command."""
    root.command()(doctor)


def doctor(
    home: HomeOption = None,
    backend: BackendOption = "local",
    endpoint: EndpointOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move damaged objects of the backend local away.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check that a grid can run on this machine.

    Each line is ok, warn, or fail, with a remedy. The exit code is 1 if a check fails. The command
    lists empty and torn objects in the grid's folder, and moves them away with --repair.

    \b
    Example: batchlab doctor
    """
    findings = examine(home_of(home), backend, endpoint, repair=repair)
    if json:
        output.show_json([one.to_json() for one in findings])
    else:
        for one in findings:
            output.show(f"{one.level:<5} {one.about:<12} {output.clean(one.text)}")
            if one.remedy:
                output.show(f"{'':<18} {output.clean(one.remedy)}")
    if any(one.level is Level.FAIL for one in findings):
        raise typer.Exit(1)


def examine(
    home: Home, backend: str, endpoint: str | None = None, *, repair: bool = False
) -> list[Finding]:
    """Run all checks in order. With `repair`, move damaged objects away."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("extras", _extras),
        ("backend", lambda: backend_findings(home, backend, endpoint)),
        ("folder", lambda: _folder(home)),
        ("objects", lambda: _objects(home, repair=repair)),
        ("sqlite", lambda: _sqlite(home)),
        ("port", _port),
        ("clock", lambda: _clock(home)),
        ("manager", lambda: _manager(home)),
        ("programs", _programs),
    ]
    findings: list[Finding] = []
    for about, check in checks:
        try:
            findings += check()
        except BatchlabError as error:
            findings.append(Finding(about, Level.FAIL, error.message, error.remedy))
        except (OSError, sqlite3.Error) as error:
            findings.append(Finding(about, Level.FAIL, f"It cannot be checked: {error}."))
    return findings


def _python() -> Iterator[Finding]:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    level = Level.OK if sys.version_info >= PYTHON else Level.FAIL
    yield Finding("python", level, text, "" if level is Level.OK else "Use Python 3.11 or newer.")


def _extras() -> Iterator[Finding]:
    lacking = [one for one in optional_dependencies.MODULES if optional_dependencies.missing(one)]
    here = ", ".join(one for one in optional_dependencies.MODULES if one not in lacking)
    text = f"installed: {here or 'none'}"
    if not lacking:
        yield Finding("extras", Level.OK, text)
    else:
        text += f"; not installed, and not needed for the backend local: {', '.join(lacking)}"
        yield Finding("extras", Level.OK, text, optional_dependencies.remedy(*lacking))


def _folder(home: Home) -> Iterator[Finding]:
    home.make()
    with tempfile.TemporaryDirectory(dir=home.path, prefix="doctor-") as name:
        file = Path(name) / "a"
        file.write_bytes(b"written")
        try:
            # A conditional create is a hard link: it fails if the name exists.
            os.link(file, Path(name) / "b")
        except OSError as error:
            yield Finding(
                "folder",
                Level.FAIL,
                f"{home.path} lies on a file system without hard links: {error.strerror}.",
                "Name a folder on a local file system with --home.",
            )
            return
    free_bytes = shutil.disk_usage(home.path).free
    text = f"{home.path} can be written, {free_bytes / 2**30:.1f} GiB free"
    if free_bytes < FAIL_BELOW_BYTES:
        yield Finding("folder", Level.FAIL, text, "Free some space, or name another with --home.")
    elif free_bytes < WARN_BELOW_BYTES:
        yield Finding("folder", Level.WARN, text, "Little room for inputs and results.")
    else:
        yield Finding("folder", Level.OK, text)


def _objects(home: Home, *, repair: bool) -> Iterator[Finding]:
    """Check the local bucket, if it exists, for damaged objects."""
    from batchlab.adapters.local.local_files import damaged

    if not home.objects.is_dir():
        return
    found = list(damaged(home.objects))
    if not found:
        yield Finding("objects", Level.OK, "no object is empty or torn")
    elif not repair:
        for key, problem in found[:MOST_NAMED]:
            yield Finding("objects", Level.FAIL, f"{home.objects / key} {problem}.")
        yield Finding(
            "objects",
            Level.FAIL,
            f"Damaged objects: {len(found)}.",
            f"`batchlab doctor --repair` moves them to {home.damaged}. They then count as absent: "
            "the grid makes them again where it can, and a submission does.",
        )
    else:
        for key, _ in found:
            target = home.damaged / key
            target.parent.mkdir(parents=True, exist_ok=True)
            (home.objects / key).replace(target)
        text = f"Damaged objects that were moved to {home.damaged}: {len(found)}."
        yield Finding("objects", Level.WARN, text)


def _sqlite(home: Home) -> Iterator[Finding]:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < SQLITE:
        yield Finding("sqlite", Level.FAIL, f"SQLite {version}", "Use a Python with 3.35 or newer.")
        return
    home.make()
    with tempfile.TemporaryDirectory(dir=home.path, prefix="doctor-") as name:
        file = Path(name) / "a.sqlite"
        with closing(sqlite3.connect(file)) as one, closing(sqlite3.connect(file)) as other:
            mode = one.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            one.execute("CREATE TABLE t (x)")
            one.execute("INSERT INTO t VALUES (1)")
            one.commit()
            seen = other.execute("SELECT count(*) FROM t").fetchone()[0]
    if mode != "wal" or seen != 1:
        yield Finding(
            "sqlite",
            Level.FAIL,
            f"SQLite {version} cannot keep a write-ahead log in {home.path} (it says {mode!r}).",
            "Name a folder on a local file system with --home; network file systems cannot.",
        )
    else:
        yield Finding("sqlite", Level.OK, f"SQLite {version}, a write-ahead log works here")


def _port() -> Iterator[Finding]:
    try:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
            with closing(socket.create_connection(("127.0.0.1", port), timeout=2)):
                yield Finding("port", Level.OK, "a port on 127.0.0.1 can be opened and reached")
    except OSError as error:
        yield Finding(
            "port",
            Level.FAIL,
            f"No port on 127.0.0.1 can be opened and reached: {error}.",
            "Allow local connections: the manager's API listens there.",
        )


def _clock(home: Home) -> Iterator[Finding]:
    home.make()
    with tempfile.NamedTemporaryFile(dir=home.path, prefix="doctor-") as file:
        file.write(b"now")
        file.flush()
        skew_s = os.stat(file.name).st_mtime - time.time()  # noqa: PTH116 - a name, not a Path
    if time.time() < SANE_S:
        remedy = "Set the clock: schedules and leases are times."
        yield Finding("clock", Level.FAIL, f"It says {time.ctime()}.", remedy)
    elif abs(skew_s) > SKEW_S:
        yield Finding(
            "clock",
            Level.WARN,
            f"The file system's clock differs from this machine's by {skew_s:.1f} s.",
            "Times in listings will be off; a folder on a local file system has no such trouble.",
        )
    else:
        yield Finding("clock", Level.OK, "the clock is sane, and the file system agrees with it")


def _manager(home: Home) -> Iterator[Finding]:
    from batchlab.client.http import Client
    from batchlab.runtime import factory

    record = home.record()
    if record is None:
        yield Finding("manager", Level.OK, f"no grid is up in {home.path}")
        return
    with Client.of(home, record) as client:
        health = client.health()
        grid = client.grid()  # with the token, unlike health
    leads = "leads" if health["leader"] else "does not lead"
    text = f"{record.url} (pid {record.pid}) answers and {leads}"
    level = Level.OK if health["leader"] else Level.WARN
    where = factory.load(record.backend).manager_log(home)
    remedy = "" if health["leader"] else f"Look again in a moment; its log is {where}."
    yield Finding("manager", level, text, remedy)
    for pool in grid["pools"]:
        if pool["trouble"]:
            yield Finding(
                f"pool {pool['name']}",
                Level.WARN,
                f"{pool['trouble']}.",
                "Its instance log says why; on AWS that is INSTANCE/failed in the stack's log "
                f"group. `batchlab grid scale {pool['name']} --auto` tries at once.",
            )


def _programs() -> Iterator[Finding]:
    for name, use in (
        ("ffmpeg", "the media example runs it"),
        ("docker", "the localstack backend runs workers in it"),
    ):
        where = shutil.which(name)
        text = f"{name}: {where}" if where else f"{name}: not found, and only needed if {use}"
        yield Finding("programs", Level.OK, text)
