"""Command `batchlab doctor`, which checks this machine, the grid's folder, and a backend.

Each check uses the feature that it tests, because a version number does not prove that a feature works.

Invariant: a check removes its own temporary resources, and cannot make another check fail. Checks of a stack do not
change resources on AWS, and are free of charge.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import secrets
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchlab.adapters.aws import endpoint as aws
from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local.objects import find_damaged
from batchlab.cli import output
from batchlab.cli.groups import Commands
from batchlab.cli.option_values import home_of
from batchlab.cli.options import BACKEND, ENDPOINT, HOME, JSON, flag
from batchlab.core import installation
from batchlab.core.errors import AlreadyExists, BackendError, BatchlabError, UsageError
from batchlab.core.ports import Outgoing, QueueSpec
from batchlab.runtime import compose_deployment, compose_project
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.runtime.factory import Backend


class Level(StrEnum):
    """Result of one check of `batchlab doctor`."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report of `batchlab doctor`. `remedy` is a sentence that explains how to solve the reported
    problem.
    """

    about: str
    level: Level
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"check": self.about, "level": self.level.value, "text": self.text, "remedy": self.remedy}


def ok(about: str, text: str, remedy: str = "") -> Finding:
    return Finding(about, Level.OK, text, remedy)


def warn(about: str, text: str, remedy: str = "") -> Finding:
    return Finding(about, Level.WARN, text, remedy)


def fail(about: str, text: str, remedy: str = "") -> Finding:
    return Finding(about, Level.FAIL, text, remedy)


def backend_findings(home: Home, name: str, endpoint: str | None) -> Iterator[Finding]:
    from batchlab.runtime import factory

    backend = factory.load(name, endpoint)
    yield ok("backend", f"{name}: {backend.description}")
    if backend.extra and (module := installation.missing(backend.extra)):
        text = installation.sentence(backend.extra, f"The backend {name}", module)
        yield fail("extra", text, installation.remedy(backend.extra))
    elif backend.capabilities.container_manager:
        yield from container_findings(home, backend)
        if place := backend.find_place(home):
            yield from _endpoint_findings(backend.endpoint_at(home, place), "named")
    elif backend.capabilities.stack:
        yield from stack_findings(home, backend)
    elif backend.bucket_scheme:
        yield _bucket(home, backend)
    elif backend.emulator:
        yield from _endpoint(home, backend)


def _bucket(home: Home, backend: Backend) -> Finding:
    try:
        backend.provide(home, lambda _: None)
    except BatchlabError as error:
        return fail("bucket", error.message, error.remedy)
    place = backend.find_place(home)
    assert place is not None
    return ok("bucket", f"{place.address} can be listed")


def _endpoint(home: Home, backend: Backend) -> Iterator[Finding]:
    """Check the endpoint that the user named, or else the running grid's endpoint, or else a temporary emulator."""
    if named := backend.find_place(home):
        yield from _endpoint_findings(backend.endpoint_at(home, named), "named")
        return
    from batchlab.adapters.local.ministack import VERSION, Emulator, environment, find, installed_version, provide

    python = find()
    if python is None:
        text = f"MiniStack {VERSION} is not here yet; the first grid fetches it from PyPI by pip"
        yield warn("emulator", text, f"It will be in {environment()}.")
        return
    provide(lambda _: None)
    version = installed_version(python)
    text = f"MiniStack {version} in {python.parent.parent}"
    is_tested = version == VERSION
    yield ok("emulator", text) if is_tested else warn("emulator", text, f"batchlab was tested with {VERSION}.")
    record, place = home.record(), home.place(backend.name)
    if record and record.backend == backend.name and place:
        yield from _endpoint_findings(backend.endpoint_at(home, place), "of the grid that is up")
        return
    with tempfile.TemporaryDirectory(prefix="batchlab-doctor-") as folder, Emulator(python, Path(folder)) as emulator:
        yield from _endpoint_findings(emulator.endpoint, "started for this check")


def _endpoint_findings(endpoint: Endpoint, whose: str) -> Iterator[Finding]:
    from batchlab.adapters.aws.endpoint import check

    url = endpoint.url
    try:
        check(endpoint)
    except BackendError as error:
        yield fail("endpoint", error.message, error.remedy)
        return
    faults = asyncio.run(_failed_checks(endpoint))
    text = f"{url} ({whose}): " + ("; ".join(faults) or "conditional creates and queues work")
    if faults:
        remedy = f"`batchlab conform --endpoint {url}` shows in detail what differs from AWS."
        yield fail("endpoint", text, remedy)
    else:
        yield ok("endpoint", text)


async def _failed_checks(at: Endpoint) -> list[str]:
    """Test a conditional create in S3 and a message in SQS, and return a text for each failed test. Raise BackendError
    if the endpoint returns an error.
    """
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
        if [message.body for message in await queue.receive(name, wait_s=5)] != ["sent"]:
            faults.append("a message that was sent is not received")
    finally:
        with suppress(BackendError):  # An error of the cleanup must not hide an error of the tests.
            await objects.delete(["a"])
            await queue.remove(name)
            with aws.translate_errors("Bucket"):
                aws.client(at, "s3", connections=1).delete_bucket(Bucket=name)
        await queue.close()
    return faults


def _caller(region: str | None) -> Finding:
    """Check the AWS credentials and the region of the environment."""
    from batchlab.cli.deploy_options import retry_notes
    from batchlab.deploy.account import Account

    try:
        with Account.open(region, notes=retry_notes) as account:
            text = f"{account.id} in {account.region}, as {account.who}"
            place = "" if account.is_real else ", at what AWS_ENDPOINT_URL puts in AWS's place"
            return ok("account", text + place)
    except (BackendError, UsageError) as error:
        return fail("account", error.message, error.remedy)


def _stack_manager(home: Home, backend: Backend) -> Finding:
    """Check that the stack named in the grid's folder is known, and that the stack's manager runs on an instance."""
    from batchlab.runtime import stack_connections

    try:
        at = backend.stack(home)
        instance = stack_connections.manager_instance(at)
    except BackendError as error:
        return fail("stack", error.message, error.remedy)
    text = f"{at.stack} in {at.region}: its manager runs on {instance}"
    return ok("stack", text)


def stack_findings(home: Home, backend: Backend) -> Iterator[Finding]:
    """Check the AWS account, the stack, and the program that opens sessions to the stack's manager."""
    from batchlab.client.aws_connection import VARIABLE
    from batchlab.runtime import aws_deployment, stack_connections

    try:
        deployment = aws_deployment.read(home)
    except BackendError:
        deployment = None  # `_stack_manager` reports the error.
    yield (caller := _caller(deployment.region if deployment else None))
    # Without credentials, the check of the stack would fail for the same reason as the check of the account.
    if caller.level is Level.OK or not deployment:
        yield _stack_manager(home, backend)
    if named := os.environ.get(VARIABLE):
        yield ok("session", f"the manager is reached at {named}")
        return
    try:
        yield ok("session", f"sessions are carried by {stack_connections.find_plugin()}")
    except UsageError as error:
        yield fail("session", error.message, error.remedy)


MIN_ENGINE_VERSION = 25
"""First Docker version in which a starting container can have its own health check interval."""
MIN_COMPOSE_VERSION = (2, 20)
"""First Docker Compose version in which a service may depend on an optional service."""
LAST_WITHOUT_TOKEN = (4, 14)
MIN_LOCALSTACK_VERSION = (4, 0)
"""First LocalStack version with conditional writes to S3."""
FAIL_BELOW_BYTES = 3 * 2**30
_LOCALSTACK = "localstack/localstack:4.14.0"
_POSTGRES = "postgres:17"


def container_findings(home: Home, backend: Backend) -> Iterator[Finding]:
    """Check Docker, Docker's plugins, the images, the token, the network, and the running services."""
    version = compose_project.docker("version", "--format", "{{.Server.Version}}")
    if version.returncode:
        reason = (version.stderr.strip().splitlines() or ["no error text"])[-1]
        remedy = "Start Docker, and see that you may use it (`docker info`)."
        yield fail("docker", f"Docker does not answer: {reason}", remedy)
        return
    yield _engine(version.stdout.strip())
    yield _plugin("compose", MIN_COMPOSE_VERSION)
    yield _plugin("buildx", (0, 10))
    yield _room()
    place = backend.find_place(home)
    if not place:
        yield _token()
        yield _image("BATCHLAB_LOCALSTACK_IMAGE", _LOCALSTACK)
    yield _image("BATCHLAB_POSTGRES_IMAGE", _POSTGRES)
    recipe = compose_project.Recipe.from_settings(os.environ, apt=backend.image.apt, pip=backend.image.pip)
    yield _image("BATCHLAB_BASE_IMAGE", recipe.base)
    yield from _parts(home)


def _engine(version: str) -> Finding:
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < MIN_ENGINE_VERSION:
        return fail("docker", f"Docker {version} is too old.", f"Install Docker {MIN_ENGINE_VERSION} or newer.")
    return ok("docker", f"Docker {version} answers")


def _plugin(name: str, least: tuple[int, int]) -> Finding:
    answer = compose_project.docker(name, "version")
    match = re.search(r"(\d+)\.(\d+)", answer.stdout)
    remedy = f"Install Docker's {name} plugin (docker-{name}), {least[0]}.{least[1]} or newer."
    if answer.returncode or match is None:
        return fail(name, f"There is no `docker {name}`.", remedy)
    text = f"docker {name} {match[0]}"
    if (int(match[1]), int(match[2])) < least:
        return fail(name, f"{text} is too old.", remedy)
    return ok(name, text)


def _room() -> Finding:
    root = compose_project.docker("info", "--format", "{{.DockerRootDir}}").stdout.strip()
    try:
        usage = os.statvfs(root)
    except OSError:
        return ok("disk", f"Docker keeps its images in {root}, not on this machine")
    free_bytes = usage.f_bavail * usage.f_frsize
    text = f"{free_bytes / 2**30:.1f} GiB free for Docker's images in {root}"
    if free_bytes < FAIL_BELOW_BYTES:
        return fail("disk", text, "Free some, for example by `docker image prune`.")
    return ok("disk", text)


def _token() -> Finding:
    image = os.environ.get("BATCHLAB_LOCALSTACK_IMAGE") or _LOCALSTACK
    has_token = bool(os.environ.get("LOCALSTACK_AUTH_TOKEN"))
    match = re.search(r":v?(\d+)\.(\d+)", image)
    if match is None or has_token:
        whose = "with LOCALSTACK_AUTH_TOKEN" if has_token else "by its name it needs no token"
        return ok("token", f"{image}, {whose}")
    version = (int(match[1]), int(match[2]))
    if version > LAST_WITHOUT_TOKEN:
        return fail(
            "token",
            f"{image} starts only with a token, and LOCALSTACK_AUTH_TOKEN is not set.",
            f"Set it, or use {_LOCALSTACK}, the last that needs none.",
        )
    if version < MIN_LOCALSTACK_VERSION:
        return fail(
            "token",
            f"{image} is too old: it does not support conditional writes to S3.",
            f"Use {_LOCALSTACK}, or leave BATCHLAB_LOCALSTACK_IMAGE out.",
        )
    return ok("token", f"{image} needs no token")


def _image(variable: str, default: str) -> Finding:
    name = os.environ.get(variable) or default
    if not compose_project.docker("image", "inspect", name).returncode:
        return ok("image", f"{name} is here")
    return warn(
        "image",
        f"{name} is not here yet; the first grid pulls it",
        f"Without an image registry: compose/offline/build.sh, and {variable} names the result.",
    )


def _parts(home: Home) -> Iterator[Finding]:
    at = compose_deployment.read(home)
    if at is None:
        subnet = compose_deployment.free_subnet(compose_project.networks(), compose_project.name_for(home))
        yield ok("network", f"the network {subnet}.0/24 is free")
    else:
        states = compose_project.Project(home, at, settings={}).states()
        for service, state in sorted(states.items()):
            text = f"{service} is {state}"
            is_up = state == "healthy"
            yield ok("service", text) if is_up else fail("service", text, "`batchlab grid up` starts it again.")
        if "localstack" in states and (place := home.place(compose_deployment.NAME)):
            url = f"{place.url}/_localstack/health"
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - the grid's emulator
                    version = str(json.load(answer).get("version", "unknown"))
            except (OSError, ValueError, urllib.error.URLError) as error:
                raise BackendError(f"LocalStack does not answer at {url}: {error}.") from error
            yield ok("emulator", f"LocalStack {version} answers")
    for project in compose_project.projects():
        if project.is_orphan:
            text = f"{project.project} is a leftover of a deleted grid, with {project.parts} parts"
            yield warn("orphans", text, "`batchlab gc` removes it.")


MIN_PYTHON_VERSION = (3, 11)
MIN_SQLITE_VERSION = (3, 35)
"""First SQLite version with RETURNING, which a fold of the ledger uses."""
FAIL_BELOW_FREE_BYTES = 200 * 2**20
WARN_BELOW_BYTES = 2 * 2**30
MIN_CLOCK_S = 1_700_000_000.0
MAX_SKEW_S = 2.0
MAX_LISTED_OBJECTS = 20
"""Maximum number of damaged objects that are listed."""


app = Commands()


@app.command()
def doctor(
    home: Path | None = HOME,
    backend: str = BACKEND,
    endpoint: str | None = ENDPOINT,
    repair: bool = flag("Move damaged objects out of the bucket of the backend local.", "--repair"),
    json: bool = JSON,
) -> None:
    """Check that a grid can run on this machine.

    The command prints one line for each check: ok, or warn or fail with a remedy. The exit code is
    1 if a check fails. The command also lists empty and incomplete objects in the grid's folder.
    With --repair, the command moves such objects out of the bucket.

    \b
    Example: batchlab doctor
    """
    place = home_of(home)
    place.require_folder()
    findings = examine(place, backend, endpoint, repair=repair)
    if json:
        output.show_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            output.show(f"{finding.level:<5} {finding.about:<12} {output.clean(finding.text)}")
            if finding.remedy:
                output.show(f"{'':<18} {output.clean(finding.remedy)}")
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(1)


def examine(home: Home, backend: str, endpoint: str | None = None, *, repair: bool = False) -> list[Finding]:
    """Run all checks of `batchlab doctor`. If `repair` is true, move damaged objects out of the local bucket."""
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
            findings.append(fail(about, error.message, error.remedy))
        except (OSError, sqlite3.Error) as error:
            findings.append(fail(about, f"It cannot be checked: {error}."))
    return findings


def _python() -> Iterator[Finding]:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield (
        ok("python", text)
        if sys.version_info >= MIN_PYTHON_VERSION
        else fail("python", text, "Use Python 3.11 or newer.")
    )


def _extras() -> Iterator[Finding]:
    missing = [extra for extra in installation.MODULES if installation.missing(extra)]
    installed = ", ".join(extra for extra in installation.MODULES if extra not in missing)
    text = f"installed: {installed or 'none'}"
    if missing:
        text += f"; not installed: {', '.join(missing)}"
    yield ok("extras", text, installation.remedy(*missing) if missing else "")


def _folder(home: Home) -> Iterator[Finding]:
    home.make()
    with tempfile.TemporaryDirectory(dir=home.path, prefix="doctor-") as name:
        file = Path(name) / "a"
        file.write_bytes(b"written")
        try:
            # Test hard links, because the local bucket creates an object with a hard link. The creation of a hard link
            # fails if the name exists.
            os.link(file, Path(name) / "b")
        except OSError as error:
            yield fail(
                "folder",
                f"{home.path} lies on a file system without hard links: {error.strerror}.",
                "Name a folder on a local file system with --home.",
            )
            return
    free_bytes = shutil.disk_usage(home.path).free
    text = f"{home.path} can be written, {free_bytes / 2**30:.1f} GiB free"
    if free_bytes < FAIL_BELOW_FREE_BYTES:
        yield fail("folder", text, "Free some space, or name another with --home.")
    elif free_bytes < WARN_BELOW_BYTES:
        yield warn("folder", text, "Little room for inputs and results.")
    else:
        yield ok("folder", text)


def _objects(home: Home, *, repair: bool) -> Iterator[Finding]:
    """Check the local bucket for damaged objects, if the local bucket exists."""
    if not home.objects.is_dir():
        return
    damaged_objects = list(find_damaged(home.objects))
    if not damaged_objects:
        yield ok("objects", "no object is empty or torn")
    elif not repair:
        for key, problem in damaged_objects[:MAX_LISTED_OBJECTS]:
            yield fail("objects", f"{home.objects / key} {problem}.")
        yield fail(
            "objects",
            f"Damaged objects: {len(damaged_objects)}.",
            f"`batchlab doctor --repair` moves them to {home.damaged}. They then count as absent: "
            "the grid makes them again where it can, and a submission does.",
        )
    else:
        for key, _ in damaged_objects:
            target = home.damaged / key
            target.parent.mkdir(parents=True, exist_ok=True)
            (home.objects / key).replace(target)
        text = f"Damaged objects that were moved to {home.damaged}: {len(damaged_objects)}."
        yield warn("objects", text)


def _sqlite(home: Home) -> Iterator[Finding]:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < MIN_SQLITE_VERSION:
        yield fail("sqlite", f"SQLite {version}", "Use a Python with 3.35 or newer.")
        return
    home.make()
    with tempfile.TemporaryDirectory(dir=home.path, prefix="doctor-") as name:
        file = Path(name) / "a.sqlite"
        with closing(sqlite3.connect(file)) as writer, closing(sqlite3.connect(file)) as reader:
            mode = writer.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            writer.execute("CREATE TABLE t (x)")
            writer.execute("INSERT INTO t VALUES (1)")
            writer.commit()
            seen = reader.execute("SELECT count(*) FROM t").fetchone()[0]
    if mode != "wal" or seen != 1:
        yield fail(
            "sqlite",
            f"SQLite {version} cannot keep a write-ahead log in {home.path} (it says {mode!r}).",
            "Name a folder on a local file system with --home; network file systems cannot.",
        )
    else:
        yield ok("sqlite", f"SQLite {version}, a write-ahead log works here")


def _port() -> Iterator[Finding]:
    try:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
            with closing(socket.create_connection(("127.0.0.1", port), timeout=2)):
                yield ok("port", "a port on 127.0.0.1 can be opened and reached")
    except OSError as error:
        yield fail(
            "port",
            f"No port on 127.0.0.1 can be opened and reached: {error}.",
            "Allow local connections: the manager's API listens there.",
        )


def _clock(home: Home) -> Iterator[Finding]:
    home.make()
    with tempfile.NamedTemporaryFile(dir=home.path, prefix="doctor-") as file:
        file.write(b"now")
        file.flush()
        skew_s = os.stat(file.name).st_mtime - time.time()  # noqa: PTH116 - `file.name` is a string
    if time.time() < MIN_CLOCK_S:
        remedy = "Set the clock: schedules and leases are times."
        yield fail("clock", f"It says {time.ctime()}.", remedy)
    elif abs(skew_s) > MAX_SKEW_S:
        yield warn(
            "clock",
            f"The file system's clock differs from this machine's by {skew_s:.1f} s.",
            "Times in listings will be off; a folder on a local file system has no such trouble.",
        )
    else:
        yield ok("clock", "the clock is sane, and the file system agrees with it")


def _manager(home: Home) -> Iterator[Finding]:
    from batchlab.client.http import Client
    from batchlab.runtime import factory

    record = home.record()
    if record is None:
        yield ok("manager", f"no grid is up in {home.path}")
        return
    with Client.of(home, record) as client:
        health = client.health()
        grid = client.grid()  # Unlike `health`, `grid` sends a request that needs the token.
    text = f"{record.url} (pid {record.pid}) answers"
    if health["leader"]:
        yield ok("manager", f"{text} and leads")
    else:
        log = factory.load(record.backend).manager_log(home)
        yield warn("manager", f"{text} and does not lead", f"Repeat the check in a moment. The log is {log}.")
    for pool in grid["pools"]:
        if pool["trouble"]:
            yield warn(
                f"pool {pool['name']}",
                f"{pool['trouble']}.",
                "Its instance log says why; on AWS that is INSTANCE/failed in the stack's log "
                f"group. `batchlab grid scale {pool['name']} --auto` tries at once.",
            )


def _programs() -> Iterator[Finding]:
    for name, use in (("ffmpeg", "the media example runs it"), ("docker", "the localstack backend runs workers in it")):
        where = shutil.which(name)
        text = f"{name}: {where}" if where else f"{name}: not found, and only needed if {use}"
        yield ok("programs", text)
