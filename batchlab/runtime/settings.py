"""Manager settings of a home: `settings.toml` overrides the settings of the backend.

Invariant: the settings apply to every later start of a manager, on this machine or in a container,
until the file changes.

    [manager]
    drain_target_s = 600
    cooldown_in_s = 120

Notification settings of a grid: `notify.toml` in its home.

The file lists the targets that receive the events of every job, and limits the targets of jobs.

Invariant: only this file can contain a command to run. A user who can write this file can run
commands anyway. A user who may only submit jobs cannot add a command. Example:

    [ops]
    webhook = "https://hooks.example.org/batch"
    secret = "env:BATCHLAB_NOTIFY_SECRET"
    on = ["failed", "stuck"]

    [chat]
    webhook = "env:CHAT_URL"
    jobs = true
    on = []

    [jobs]
    local = ["http://127.0.0.1:8000"]

    [jobs.secrets]
    BATCHLAB_NOTIFY_SECRET = ["https://hooks.example.org"]
"""

from __future__ import annotations

import logging
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any
from urllib.parse import urlsplit

from batchlab.core import notifications
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import UsageError
from batchlab.core.notifications import KINDS, MOMENTS, SECRET_PREFIX, TARGET_NAME, Directory, Target
from batchlab.manager.state import ManagerSettings
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

TABLE = "manager"
_NAMES = tuple(field.name for field in fields(ManagerSettings))
_WHOLE = frozenset(field.name for field in fields(ManagerSettings) if field.type == "int")
_MAY_BE_0 = frozenset({"cooldown_in_s", "idle_s", "boot_pause_s"})


def applied(backend: Backend, home: Home) -> Backend:
    """Return the backend with the home's settings.

    Raise UsageError if the file contains an unknown setting or an invalid value, or if the control
    lease is shorter than the workers' lease.
    """
    manager = ManagerSettings(**{**asdict(backend.manager), **read(home)})
    workers_s = backend.worker.control_lease_s
    if manager.control_lease_s < workers_s:
        # Otherwise a cancellation could be acknowledged while workers may still start tasks.
        raise UsageError(
            f"{home.settings_file} says control_lease_s = {manager.control_lease_s:g}, which is "
            f"shorter than the lease of the workers ({workers_s:g} s).",
            remedy=f"Write {workers_s:g} or more, or leave it out.",
        )
    return replace(backend, manager=manager)


def read(home: Home) -> dict[str, float]:
    """Return the home's settings by name. Raise UsageError if the file is invalid."""
    path = home.settings_file
    try:
        doc = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"The grid's settings {path} cannot be read: {why}.", remedy="Mend or delete the file."
        ) from error
    for name in doc.keys() - {TABLE}:
        raise UsageError(
            f"{path} has {name!r}, which is nothing that a grid can be told.", remedy=f"Write settings below [{TABLE}]."
        )
    found: dict[str, float] = {}
    if not isinstance(said_here := doc.get(TABLE, {}), dict):
        raise UsageError(
            f"{path} says {TABLE} = {said_here!r}, which is no table.", remedy=f"Write settings below [{TABLE}]."
        )
    for name, value in said_here.items():
        if name not in _NAMES:
            raise UsageError(
                f"{path} has {name!r}, which is no setting of a manager.", remedy=f"There are {', '.join(_NAMES)}."
            )
        if not _is_setting(name, value):
            raise UsageError(
                f"{path} says {name} = {value!r}, which is not a number that this can be.",
                remedy="Write seconds, such as drain_target_s = 600.",
            )
        found[name] = value
    return found


def _is_setting(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    whole = name not in _WHOLE or isinstance(value, int)
    enough = value > 0 or (value == 0 and name in _MAY_BE_0)
    return whole and enough and math.isfinite(value)


@contextmanager
def said(home: Home, values: Mapping[str, float], *, why: str, keep: bool = False) -> Iterator[None]:
    """Write these settings to the home's file for the duration of the context.

    They are merged with the existing settings. Afterwards the previous file is restored, unless
    `keep` is set. Without `values`, the file is not touched.
    """
    if not values:
        yield
        return
    path = home.settings_file
    home.make()
    before = path.read_bytes() if path.exists() else None
    lines = [f"# {why}", f"[{TABLE}]"]
    lines += [f"{name} = {value!r}" for name, value in {**read(home), **values}.items()]
    write_whole(path, "\n".join([*lines, ""]))
    try:
        yield
    finally:
        if not keep and before is None:
            path.unlink(missing_ok=True)
        elif not keep and before is not None:
            write_whole(path, before)


log = logging.getLogger(__name__)

_ENV = "env:"
KEYS = (*KINDS, "on", "secret", "failures", "stuck_after", "jobs")
CONTAINERS = "localstack"
"""Backend whose manager runs in a container. Its folder in a home has the same name."""
JOBS = "jobs"
"""Name of the table with the limits of jobs' targets. All other tables are targets."""


def read_notifications(home: Home, environ: Mapping[str, str] = os.environ, *, in_container: bool = False) -> Directory:
    """Return the settings, which are empty without a file. Raise UsageError if the file is invalid.

    A manager in a container can write this file, but must not choose a command for its user. If the
    home was ever used by such a manager, commands are refused outside a container.
    """
    path = home.notify_file
    try:
        doc = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return Directory()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"The grid's targets {path} cannot be read: {why}.", remedy="Mend or delete the file."
        ) from error
    local, secrets = _of_jobs(str(path), doc.pop(JOBS, {}))
    targets = [_target(str(path), name, fields, environ) for name, fields in doc.items()]
    if not in_container and home.of(CONTAINERS).exists() and any(target.command for target in targets):
        raise UsageError(
            f"{path} names a command, and a manager in a container could have written it.",
            remedy=f"Name another folder with --home, or read the file and delete {home.of(CONTAINERS)}.",
        )
    return Directory(tuple(targets), local, secrets)


def variables(home: Home, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of the set variables that the manager needs for its notifications.

    These are the variables that the grid's targets name, and those that jobs may name. Raise
    UsageError if the file is invalid.
    """
    read_notifications(home, environ, in_container=True)
    doc = tomllib.loads(home.notify_file.read_text()) if home.notify_file.exists() else {}
    texts = [text for fields in doc.values() for text in fields.values() if isinstance(text, str)]
    named = {text.removeprefix(_ENV) for text in texts if text.startswith(_ENV)}
    ours = {name for name in environ if name.startswith(SECRET_PREFIX)}
    return sorted((named | ours) & environ.keys())


def _of_jobs(where: str, fields: Any) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Return the local origins that jobs' targets may use, and the allowed origins by secret."""
    if not isinstance(fields, dict) or not isinstance(fields.get("secrets", {}), dict):
        raise UsageError(
            f"{where}: [{JOBS}] is about what jobs may do, and it is no table of that.",
            remedy=f"Write local = [ORIGIN] below [{JOBS}], and NAME = [ORIGIN] below "
            f"[{JOBS}.secrets]; a target needs another name.",
        )
    if unknown := sorted(fields.keys() - {"local", "secrets"}):
        raise UsageError(
            f"{where}: [{JOBS}] has {unknown[0]!r}, which is no key.",
            remedy="There are local and secrets. A target needs another name.",
        )
    secrets: dict[str, frozenset[str]] = {}
    for name, given in fields.get("secrets", {}).items():
        if not name.startswith(SECRET_PREFIX):
            raise UsageError(
                f"{where}: [{JOBS}.secrets] has {name!r}, which no job can name as its secret.",
                remedy=f"The names of such variables begin with {SECRET_PREFIX}.",
            )
        secrets[name] = _origins(f"{where}: {name} below [{JOBS}.secrets]", given)
    return _origins(f"{where}: local below [{JOBS}]", fields.get("local", [])), secrets


def _origins(where: str, given: Any) -> frozenset[str]:
    found = set()
    if not isinstance(given, list):
        raise UsageError(f"{where} is no list.", remedy='Write ["https://hooks.example.org"].')
    for one in given:
        try:
            parts = urlsplit(str(one))
            found.add(notifications.origin(str(one)))
        except ValueError:
            parts = urlsplit("")
        if not parts.netloc or "@" in parts.netloc or parts.path.strip("/") or parts.query:
            raise UsageError(
                f"{where} has {str(one)!r}, which is no origin.",
                remedy="Write scheme, host and, unless it is the usual one, port, without a path: "
                '"https://hooks.example.org:8443".',
            )
    return frozenset(found)


def watched(home: Home, *, in_container: bool = False) -> Callable[[], Directory]:
    """Return a function that returns the current settings.

    It reads the file again after a change. If the new file is invalid, it logs a warning once and
    returns the previous settings.
    """
    seen: tuple[int, int] | None = None
    known = read_notifications(home, in_container=in_container)

    def now() -> Directory:
        nonlocal seen, known
        try:
            stat = home.notify_file.stat()
            state = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            state = (0, 0)
        if state != seen:
            seen = state
            try:
                known = read_notifications(home, in_container=in_container)
            except UsageError as error:
                log.warning("the targets stay what they were: %s", error)
        return known

    return now


def _target(where: str, name: str, fields: Any, environ: Mapping[str, str]) -> Target:
    def wrong(what: str, remedy: str) -> UsageError:
        return UsageError(f"{where}: target {name!r} {what}.", remedy=remedy)

    if not TARGET_NAME.fullmatch(name):
        raise wrong("has no fit name", "Use up to 40 small letters, digits, '-' and '_'.")
    if not isinstance(fields, dict):
        raise wrong("is no table", f"Write [{name}] and its keys below.")
    if unknown := sorted(fields.keys() - set(KEYS)):
        raise wrong(f"has {unknown[0]!r}, which is no key", f"There are {', '.join(KEYS)}.")
    kinds = [kind for kind in KINDS if kind in fields]
    if len(kinds) != 1:
        raise wrong("does not say one way", "Write one of webhook, sns and command.")
    (kind,) = kinds
    on = fields.get("on", ["ended"])
    on = [on] if isinstance(on, str) else on
    if not isinstance(on, list) or not all(isinstance(one, str) for one in on):
        raise wrong("has an 'on' that is no list", f"The moments are {', '.join(MOMENTS)}.")
    # Import this here. It imports the whole job file module, which would slow every worker's start.
    from batchlab.core import text as units

    command = _command(fields["command"]) if kind == "command" else ()
    if command is None:
        raise wrong("has a command that is no list of texts", 'Write command = ["program"].')
    try:
        stuck_s = units.seconds(fields.get("stuck_after", 600))
    except ValueError as error:
        raise wrong(f"says stuck_after, but {error}", f"Write {units.DURATION_FORMS}.") from error
    failures = fields.get("failures", 1)
    if type(failures) is not int:
        raise wrong(f"says failures = {failures!r}", "Write a whole number.")
    jobs = fields.get("jobs", False)
    if not isinstance(jobs, bool):
        raise wrong(f"says jobs = {jobs!r}", "Write true where jobs may name it.")
    to = "" if kind == "command" else _looked_up(str(fields[kind]), environ, wrong)
    secret = str(fields.get("secret", ""))
    target = Target(name, kind, to, command, tuple(on), secret, failures, stuck_s, jobs=jobs)
    if problem := notifications.target_problem(target):
        raise wrong("cannot be used", problem)
    return target


def _command(given: Any) -> tuple[str, ...] | None:
    fits = isinstance(given, list) and all(isinstance(one, str) for one in given)
    return tuple(given) if fits else None


def _looked_up(text: str, environ: Mapping[str, str], wrong: Callable[[str, str], UsageError]) -> str:
    """Return an address, or the value of the variable that it names. Some addresses are secrets."""
    if not text.startswith(_ENV):
        return text
    name = text.removeprefix(_ENV)
    if found := environ.get(name):
        return found
    raise wrong(
        f"is at what {name} says, and that is not set",
        "Set the variable where the grid is brought up, or write the address here.",
    )
