"""Manager settings of a home: `settings.toml` overrides the settings of the backend.

Invariant: the settings apply to every later start of a manager, on this machine or in a container,
until the file changes.

    [manager]
    drain_target_s = 600
    cooldown_in_s = 120
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace

from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import UsageError
from batchlab.manager.settings import ManagerSettings
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
            f"{path} has {name!r}, which is nothing that a grid can be told.",
            remedy=f"Write settings below [{TABLE}].",
        )
    found: dict[str, float] = {}
    if not isinstance(said_here := doc.get(TABLE, {}), dict):
        raise UsageError(
            f"{path} says {TABLE} = {said_here!r}, which is no table.",
            remedy=f"Write settings below [{TABLE}].",
        )
    for name, value in said_here.items():
        if name not in _NAMES:
            raise UsageError(
                f"{path} has {name!r}, which is no setting of a manager.",
                remedy=f"There are {', '.join(_NAMES)}.",
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
def said(
    home: Home, values: Mapping[str, float], *, why: str, keep: bool = False
) -> Iterator[None]:
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
