"""The rights of a worker's role on AWS, enforced at the ports of simulated workers.

Invariant: a call outside these rights has no effect. `tests/sim/test_rights.py` compares the key
patterns and queue actions with the stack template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from batchlab.errors import BackendError
from batchlab.protocol import naming

READS = ("boot/*", "code/*", "files/*", "jobs/*", "raw/*")
WRITES = (
    "files/*",
    "logs/*",
    "jobs/*/*/outcomes/*",
    "jobs/*/*/running/*",
    "jobs/*/*/starts/*",
)
DELETES = ("jobs/*/*/starts/*",)
CONDITIONAL = ("jobs/*/*/outcomes/*",)
"""Keys that the bucket's policy protects from overwriting."""


def _matcher(patterns: Sequence[str]) -> Callable[[str], object]:
    # In IAM a `*` stands for any characters, slashes included.
    texts = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns]
    return re.compile("|".join(texts), re.DOTALL).fullmatch


_may_read, _may_write = _matcher(READS), _matcher(WRITES)
_may_delete, _is_conditional = _matcher(DELETES), _matcher(CONDITIONAL)


def _reads(args: Sequence[Any], _conditional: bool) -> bool:
    return bool(_may_read(args[0]))


def _puts(args: Sequence[Any], conditional: bool) -> bool:
    key = args[0]
    return bool(_may_write(key)) and (conditional or not _is_conditional(key))


def _deletes(args: Sequence[Any], _conditional: bool) -> bool:
    return all(map(_may_delete, args[0]))


def _takes(args: Sequence[Any], _conditional: bool) -> bool:
    queue = args[0]
    return queue.startswith("tasks-") and not queue.endswith("-dead")


def _sends(args: Sequence[Any], conditional: bool) -> bool:
    return args[0] == naming.EVENTS or _takes(args, conditional)


def _anything(_args: Sequence[Any], _conditional: bool) -> bool:
    return True


_ALLOWED: dict[str, Callable[[Sequence[Any], bool], bool]] = {
    "objects.get": _reads,
    "objects.get_range": _reads,
    "objects.get_if_changed": _reads,
    "objects.head": _reads,
    "objects.download": _reads,
    "objects.list": _anything,
    "objects.put": _puts,
    "objects.upload": _puts,
    "objects.delete": _deletes,
    "queue.receive": _takes,
    "queue.delete": _takes,
    "queue.change_visibility": _takes,
    "queue.send": _sends,
}


class AccessDenied(BackendError):
    """AWS refuses a call that the role does not allow."""


class Rights:
    """The rights of one simulated worker.

    `denied` is called with each refused call. `deaf` refuses receives: a lying worker may stop its
    honest part from receiving.
    """

    def __init__(self, denied: Callable[[str], None]) -> None:
        self._denied = denied
        self.deaf = False

    def check(self, label: str, args: Sequence[Any], *, conditional: bool) -> None:
        """Raise AccessDenied if the role does not allow the call."""
        if self.deaf and label == "queue.receive":
            raise AccessDenied("This worker no longer receives messages.")
        allowed = _ALLOWED.get(label)
        if allowed is not None and allowed(args, conditional):
            return
        call = f"{label}({', '.join(map(repr, args[:1]))})"
        self._denied(call)
        raise AccessDenied(f"A worker's role does not allow {call}.")
