"""What `doctor` looks at. Every check is tried for real: a version number promises little.

Invariant: nothing is left behind, and no check can make another one fail.

The lines of `doctor`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.core import optional_dependencies
from batchlab.core.errors import AlreadyExists, BackendError, BatchlabError
from batchlab.core.ports import Outgoing, QueueSpec
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.runtime.factory import Backend


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `remedy` says what to do about it."""

    about: str
    level: Level
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.about,
            "level": self.level.value,
            "text": self.text,
            "remedy": self.remedy,
        }


PYTHON = (3, 11)
SQLITE = (3, 35)
"""The first with RETURNING, by which a fold knows what was new."""
FAIL_BELOW_BYTES = 200 * 2**20
WARN_BELOW_BYTES = 2 * 2**30
SANE_S = 1_700_000_000.0
SKEW_S = 2.0
MOST_NAMED = 20
"""Damaged objects that are named one by one."""


def examine(
    home: Home, backend: str, endpoint: str | None = None, *, repair: bool = False
) -> list[Finding]:
    """Every check, in order. With `repair`, damaged objects are moved away."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("extras", _extras),
        ("backend", lambda: _backend(home, backend, endpoint)),
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


def _backend(home: Home, name: str, endpoint: str | None) -> Iterator[Finding]:
    from batchlab.runtime import factory

    backend = factory.load(name, endpoint)
    yield Finding("backend", Level.OK, f"{name}: {backend.description}")
    if backend.extra and (module := optional_dependencies.missing(backend.extra)):
        said = optional_dependencies.sentence(backend.extra, f"The backend {name}", module)
        yield Finding("extra", Level.FAIL, said, optional_dependencies.remedy(backend.extra))
    elif backend.capabilities.container_manager:
        from batchlab.cli.doctor_backends import containers

        yield from containers(home, backend)
        if named := backend.named_place(home):
            yield from _tried(backend.endpoint_at(home, named), "named")
    elif backend.capabilities.stack:
        from batchlab.cli.doctor_backends import stack

        yield from stack(home, backend)
    elif backend.bucket_scheme:
        yield _bucket(home, backend)
    elif backend.emulator:
        yield from _endpoint(home, backend)


def _bucket(home: Home, backend: Backend) -> Finding:
    try:
        backend.provide(home, lambda _: None)
    except BatchlabError as error:
        return Finding("bucket", Level.FAIL, error.message, error.remedy)
    named = backend.named_place(home)
    assert named is not None
    return Finding("bucket", Level.OK, f"{named.address} can be listed")


def _endpoint(home: Home, backend: Backend) -> Iterator[Finding]:
    """The one that is named, that of the grid which is up, or an emulator started for this."""
    if named := backend.named_place(home):
        yield from _tried(backend.endpoint_at(home, named), "named")
        return
    from batchlab.adapters.local.ministack import VERSION, Emulator, find, provide
    from batchlab.adapters.local.ministack_install import environment, installed_version

    python = find()
    if python is None:
        text = f"MiniStack {VERSION} is not here yet; the first grid fetches it from PyPI by pip"
        yield Finding("emulator", Level.WARN, text, f"It will be in {environment()}.")
        return
    provide(lambda _: None)
    version = installed_version(python)
    level = Level.OK if version == VERSION else Level.WARN
    remedy = "" if level is Level.OK else f"batchlab was tested with {VERSION}."
    yield Finding("emulator", level, f"MiniStack {version} in {python.parent.parent}", remedy)
    record, place = home.record(), home.place(backend.name)
    if record and record.backend == backend.name and place:
        yield from _tried(backend.endpoint_at(home, place), "of the grid that is up")
        return
    with (
        tempfile.TemporaryDirectory(prefix="batchlab-doctor-") as folder,
        Emulator(python, Path(folder)) as emulator,
    ):
        yield from _tried(emulator.endpoint, "started for this check")


def _tried(endpoint: Endpoint, whose: str) -> Iterator[Finding]:
    from batchlab.adapters.aws.endpoint import check

    url = endpoint.url
    try:
        check(endpoint)
    except BackendError as error:
        yield Finding("endpoint", Level.FAIL, error.message, error.remedy)
        return
    faults = asyncio.run(_faults(endpoint))
    text = f"{url} ({whose}): " + ("; ".join(faults) or "conditional creates and queues work")
    if faults:
        remedy = f"`batchlab conform --endpoint {url}` shows in detail what differs from AWS."
        yield Finding("endpoint", Level.FAIL, text, remedy)
    else:
        yield Finding("endpoint", Level.OK, text)


async def _faults(at: Endpoint) -> list[str]:
    """What does not work there of what every job needs; BackendError where nothing does."""
    from batchlab.adapters.aws import endpoint as aws
    from batchlab.adapters.aws.objects import open_s3
    from batchlab.adapters.aws.sqs import SqsQueue

    faults = []
    name = f"batchlab-doctor-{secrets.token_hex(5)}"
    objects, queue = open_s3(at, name), SqsQueue(at)
    try:
        await objects.put("a", b"first", if_absent=True)
        with suppress(AlreadyExists):
            await objects.put("a", b"second", if_absent=True)
            faults.append("a conditional create replaces what is there")
        await queue.ensure(QueueSpec(name))
        await queue.send(name, [Outgoing("sent")])
        if [one.body for one in await queue.receive(name, wait_s=5)] != ["sent"]:
            faults.append("a message that was sent is not received")
    finally:
        with suppress(BackendError):  # what made it fail is told, not this
            await objects.delete(["a"])
            await queue.remove(name)
            with aws.translated("Bucket"):
                aws.client(at, "s3", connections=1).delete_bucket(Bucket=name)
        await queue.close()
    return faults


def _folder(home: Home) -> Iterator[Finding]:
    home.make()
    with tempfile.TemporaryDirectory(dir=home.path, prefix="doctor-") as name:
        file = Path(name) / "a"
        file.write_bytes(b"written")
        try:
            # A conditional create is a hard link: it fails where the name is taken.
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
    """Damaged objects of the backend `local`; nothing where there is no bucket."""
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
