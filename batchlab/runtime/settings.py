"""Settings files of a home: `settings.toml` for the manager, and `notify.toml` for notifications.

`settings.toml` overrides the settings of the backend. Invariant: every manager that starts later uses the settings in
`settings.toml`, on this machine or in a container, until the file changes.

    [manager]
    drain_target_s = 600
    cooldown_in_s = 120

`notify.toml` lists the targets that receive the events of every job, and limits the targets of jobs. Invariant: only
`notify.toml` can contain a command to run. A user who can write `notify.toml` can also run commands without
`notify.toml`. A user who may only submit jobs cannot make the manager run a command.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any
from urllib.parse import urlsplit

from batchlab.core import notifications
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import UsageError
from batchlab.core.installation import read_toml
from batchlab.core.notifications import KINDS, MOMENTS, SECRET_PREFIX, TARGET_NAME, NotificationSettings, Target
from batchlab.core.service_settings import ManagerSettings
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

log = logging.getLogger(__name__)

TABLE = "manager"
_NAMES = tuple(field.name for field in fields(ManagerSettings))
_WHOLE = frozenset(field.name for field in fields(ManagerSettings) if field.type == "int")
_MAY_BE_0 = frozenset({"cooldown_in_s", "idle_s", "boot_pause_s", "orphan_s"})

_ENV = "env:"
KEYS = (*KINDS, "on", "secret", "failures", "stuck_after", "jobs")
CONTAINERS = "localstack"
"""Name of the backend whose manager runs in a container. The backend's folder in a home has the backend's name."""
JOBS = "jobs"
"""Name of the table in `notify.toml` with the limits for the targets of jobs.

Every other table of `notify.toml` describes a target.
"""


def _require(is_valid: object, problem: str, remedy: str) -> None:
    if not is_valid:
        raise UsageError(problem, remedy=remedy)


# --- Manager -------------------------------------------------------------------------------------


def with_home_settings(backend: Backend, home: Home) -> Backend:
    """Return the backend with the settings in the home's `settings.toml`.

    Raise UsageError if `settings.toml` is invalid, or if the control lease in `settings.toml` is shorter than the
    workers' control lease.
    """
    manager = ManagerSettings(**{**asdict(backend.manager), **read(home)})
    workers_s = backend.worker.control_lease_s
    # If the manager's control lease were shorter than the workers' control lease, the manager could acknowledge a
    # cancellation while workers may still start tasks.
    _require(
        manager.control_lease_s >= workers_s,
        f"{home.settings_file} sets control_lease_s = {manager.control_lease_s:g}, which is "
        f"shorter than the lease of the workers ({workers_s:g} s).",
        f"Write {workers_s:g} or more, or remove this setting.",
    )
    return replace(backend, manager=manager)


def read(home: Home) -> dict[str, float]:
    """Return the settings of the home's `settings.toml`, by name. Raise UsageError if `settings.toml` is invalid."""
    path = home.settings_file
    doc = read_toml(path) if path.exists() else {}
    for name in doc.keys() - {TABLE}:
        raise UsageError(f"{path} has the unknown table or key {name!r}.", remedy=f"Write settings below [{TABLE}].")
    values: dict[str, float] = doc.get(TABLE, {})
    _require(
        isinstance(values, dict),
        f"{path} sets {TABLE} = {values!r} instead of a table.",
        f"Write settings below [{TABLE}].",
    )
    for name, value in values.items():
        _require(
            name in _NAMES,
            f"{path} has the unknown manager setting {name!r}.",
            f"The settings are {', '.join(_NAMES)}.",
        )
        _require(
            _is_valid(name, value),
            f"{path} sets {name} = {value!r}, which is not a valid number for this setting.",
            "Write seconds, such as drain_target_s = 600.",
        )
    return values


def _is_valid(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if name in _WHOLE else int | float):
        return False
    return math.isfinite(value) and (value > 0 or (value == 0 and name in _MAY_BE_0))


@contextmanager
def temporary_settings(home: Home, values: Mapping[str, float], *, why: str, keep: bool = False) -> Iterator[None]:
    """Write the settings `values` to the home's `settings.toml` for the duration of a `with` block.

    The settings in `values` are merged with the existing settings. At the end of the `with` block, the previous file is
    restored, unless `keep` is set. If `values` is empty, `settings.toml` does not change.
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


# --- Notifications -------------------------------------------------------------------------------


def read_notifications(
    home: Home, environ: Mapping[str, str] = os.environ, *, in_container: bool = False
) -> NotificationSettings:
    """Return the settings in `notify.toml`, or empty settings without the file. Raise UsageError if the file is
    invalid.

    A manager in a container can write `notify.toml`, but must not choose a command that runs outside its container. If
    a manager in a container has ever used the home, commands in `notify.toml` are refused outside a container.
    """
    path = home.notify_file
    doc = read_toml(path) if path.exists() else {}
    local, secrets = _limits_of_jobs(str(path), doc.pop(JOBS, {}))
    targets = [_target(f"{path}: target {name!r}", name, table, environ) for name, table in doc.items()]
    container_folder = home.backend_folder(CONTAINERS)
    _require(
        in_container or not container_folder.exists() or not any(target.command for target in targets),
        f"{path} contains a command, and a manager in a container may have written it.",
        f"Name another folder with --home, or check the file and delete {container_folder}.",
    )
    return NotificationSettings(tuple(targets), local, secrets)


def notification_variables(home: Home, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of those environment variables in `environ` that the manager needs for notifications.

    The manager needs the variables that the grid's targets name, and the variables that jobs may name. Raise UsageError
    if `notify.toml` is invalid.
    """
    read_notifications(home, environ, in_container=True)
    doc = read_toml(home.notify_file) if home.notify_file.exists() else {}
    texts = [text for table in doc.values() for text in table.values() if isinstance(text, str)]
    named = {text.removeprefix(_ENV) for text in texts if text.startswith(_ENV)}
    for_jobs = {name for name in environ if name.startswith(SECRET_PREFIX)}
    return sorted((named | for_jobs) & environ.keys())


def notification_watcher(home: Home, *, in_container: bool = False) -> Callable[[], NotificationSettings]:
    """Return a function that returns the current notification settings.

    The returned function reads `notify.toml` again after a change. If the changed file is invalid, the function logs a
    warning once and returns the previous settings.
    """
    last_state: tuple[int, int] | None = None
    directory = read_notifications(home, in_container=in_container)

    def current() -> NotificationSettings:
        nonlocal last_state, directory
        try:
            stat = home.notify_file.stat()
            state = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            state = (0, 0)
        if state != last_state:
            last_state = state
            try:
                directory = read_notifications(home, in_container=in_container)
            except UsageError as error:
                log.warning("the manager continues with the previous notification settings: %s", error)
        return directory

    return current


def _limits_of_jobs(where: str, table: Any) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Return the local origins that jobs' targets may use, and the permitted origins of each secret."""
    _require(
        isinstance(table, dict) and isinstance(table.get("secrets", {}), dict),
        f"{where}: [{JOBS}] must be a table with the limits of jobs, and [{JOBS}.secrets] a table too.",
        f"Write local = [ORIGIN] below [{JOBS}], and NAME = [ORIGIN] below [{JOBS}.secrets]. "
        f"A target cannot be called {JOBS}.",
    )
    unknown = sorted(table.keys() - {"local", "secrets"})
    _require(
        not unknown,
        f"{where}: [{JOBS}] has the unknown key {', '.join(map(repr, unknown))}.",
        f"The keys are local and secrets. A target cannot be called {JOBS}.",
    )
    secrets: dict[str, frozenset[str]] = {}
    for name, origins in table.get("secrets", {}).items():
        _require(
            name.startswith(SECRET_PREFIX),
            f"{where}: [{JOBS}.secrets] has {name!r}, which jobs cannot use as a secret.",
            f"The names of such variables begin with {SECRET_PREFIX}.",
        )
        secrets[name] = _origins(f"{where}: {name} below [{JOBS}.secrets]", origins)
    return _origins(f"{where}: local below [{JOBS}]", table.get("local", [])), secrets


def _origins(where: str, texts: Any) -> frozenset[str]:
    origins = set()
    _require(isinstance(texts, list), f"{where} is not a list.", 'Write ["https://hooks.example.org"].')
    for text in map(str, texts):
        try:
            parts = urlsplit(text)
            origins.add(notifications.origin(text))
        except ValueError:
            parts = urlsplit("")
        _require(
            parts.netloc and "@" not in parts.netloc and not parts.path.strip("/") and not parts.query,
            f"{where} has {text!r}, which is not an origin.",
            "Write scheme, host, and port, without a path. The usual port may be left out: "
            '"https://hooks.example.org:8443".',
        )
    return frozenset(origins)


def _target(where: str, name: str, table: Any, environ: Mapping[str, str]) -> Target:
    # Only the function `_target` needs the module `core.text`.
    from batchlab.core import text as units

    def require(is_valid: object, problem: str, remedy: str) -> None:
        _require(is_valid, f"{where} {problem}.", remedy)

    require(TARGET_NAME.fullmatch(name), "has an invalid name", "Use up to 40 small letters, digits, '-' and '_'.")
    require(isinstance(table, dict), "is not a table", f"Write [{name}] and its keys below.")
    unknown = sorted(table.keys() - set(KEYS))
    require(not unknown, f"has the unknown key {', '.join(map(repr, unknown))}", f"The keys are {', '.join(KEYS)}.")
    kinds = [kind for kind in KINDS if kind in table]
    require(len(kinds) == 1, f"has {len(kinds)} addresses", "Write exactly one of webhook, sns, and command.")
    (kind,) = kinds
    on = table.get("on", ["ended"])
    on = [on] if isinstance(on, str) else on
    require(
        _are_texts(on), "has a value of 'on' that is not a list of moments", f"The moments are {', '.join(MOMENTS)}."
    )
    command = table["command"] if kind == "command" else []
    require(_are_texts(command), "has a command that is not a list of texts", 'Write command = ["program"].')
    try:
        stuck_s = units.seconds(table.get("stuck_after", 600))
    except ValueError as error:
        raise UsageError(
            f"{where} has an invalid stuck_after: {error}.", remedy=f"Write {units.DURATION_FORMS}."
        ) from error
    failures, jobs = table.get("failures", 1), table.get("jobs", False)
    require(type(failures) is int, f"has failures = {failures!r}", "Write a whole number.")
    require(isinstance(jobs, bool), f"has jobs = {jobs!r}", "Write true if jobs may name it, else false.")
    address = "" if kind == "command" else str(table[kind])
    if address.startswith(_ENV):
        # The address of a target may be a secret, so the user may write the address in an environment variable.
        variable = address.removeprefix(_ENV)
        address = environ.get(variable, "")
        require(
            address,
            f"needs the variable {variable}, which is not set",
            "Set the variable in the environment of `batchlab grid up`, or write the address into the file.",
        )
    target = Target(
        name, kind, address, tuple(command), tuple(on), str(table.get("secret", "")), failures, stuck_s, jobs=jobs
    )
    problem = notifications.target_problem(target)
    require(not problem, "cannot be used", problem)
    return target


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
