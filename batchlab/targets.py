"""Whom a grid notifies of every job: `notify.toml` in its home.

Invariant: a command to run stands here and nowhere else, since who may write this file may run
commands anyway, and who may submit a job may not.

    [ops]
    webhook = "https://hooks.example.org/batch"
    secret = "env:BATCHLAB_NOTIFY_SECRET"
    on = ["failed", "stuck"]
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from batchlab import notification
from batchlab.errors import UsageError
from batchlab.home import Home
from batchlab.notification import KINDS, MOMENTS, Target
from batchlab.spec import units

log = logging.getLogger(__name__)

KEYS = (*KINDS, "on", "secret", "failures", "stuck_after")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


def read(home: Home, environ: Mapping[str, str] = os.environ) -> list[Target]:
    """The grid's targets, none where there is no such file; UsageError where one is wrong."""
    path = home.notify_file
    try:
        doc = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"The grid's targets {path} cannot be read: {why}.", remedy="Mend or delete the file."
        ) from error
    return [_target(str(path), name, fields, environ) for name, fields in doc.items()]


def watched(home: Home) -> Callable[[], Sequence[Target]]:
    """The same as it is at each call. What has become wrong is told once, and what was, holds."""
    seen: tuple[int, int] | None = None
    known: list[Target] = read(home)

    def now() -> Sequence[Target]:
        nonlocal seen, known
        try:
            stat = home.notify_file.stat()
            state = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            state = (0, 0)
        if state != seen:
            seen = state
            try:
                known = read(home)
            except UsageError as error:
                log.warning("the targets stay what they were: %s", error)
        return known

    return now


def _target(where: str, name: str, fields: Any, environ: Mapping[str, str]) -> Target:
    def wrong(what: str, remedy: str) -> UsageError:
        return UsageError(f"{where}: target {name!r} {what}.", remedy=remedy)

    if not _NAME.fullmatch(name):
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
    command: tuple[str, ...] = ()
    if kind == "command":
        given = fields["command"]
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise wrong("has a command that is no list of texts", 'Write command = ["program"].')
        command = tuple(given)
    try:
        stuck_s = units.seconds(fields.get("stuck_after", 600))
    except ValueError as error:
        raise wrong(f"says stuck_after, but {error}", f"Write {units.DURATION_FORMS}.") from error
    failures = fields.get("failures", 1)
    if type(failures) is not int:
        raise wrong(f"says failures = {failures!r}", "Write a whole number.")
    to = "" if command else _looked_up(fields[kind], environ)
    secret = str(fields.get("secret", ""))
    target = Target(name, kind, to, command, tuple(on), secret, failures, stuck_s)
    if problem := notification.target_problem(target):
        raise wrong("cannot be used", problem)
    return target


def _looked_up(given: Any, environ: Mapping[str, str]) -> str:
    """An address, or what the variable holds that stands for it: some are secrets themselves."""
    text = str(given)
    return environ.get(text.removeprefix("env:"), "") if text.startswith("env:") else text
