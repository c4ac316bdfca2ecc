"""The rights of a worker's role on AWS, enforced at the ports of simulated workers.

Invariant: a call outside these rights has no effect. `tests/sim/test_worker_rights.py` compares the
key patterns and queue actions with the stack template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from batchlab.errors import BackendError
from batchlab.protocol import naming

READS = (
    "boot/*",
    "code/*",
    "files/*",
    "jobs/*/spec.json",
    "jobs/*/control.json",
    "jobs/*/*/plan/*/manifest.json",
    "jobs/*/*/plan/*/part-*",
    "jobs/*/*/plan/*/item-*",
    "jobs/*/*/outcomes/*",
    "jobs/*/*/replaced/*",
    "jobs/*/*/running/*",
    "raw/*",
)
WRITES = (
    "files/*",
    "logs/*",
    "jobs/*/*/outcomes/*",
    "jobs/*/*/running/*",
    "jobs/*/*/starts/*",
)
CONDITIONAL = ("files/*", "logs/*.log", "jobs/*/*/outcomes/*", "jobs/*/*/starts/*")
"""Keys that the bucket's policy protects from overwriting."""


def _matcher(patterns: Sequence[str]) -> Callable[[str], object]:
    # In IAM a `*` stands for any characters, slashes included.
    texts = [".*".join(map(re.escape, pattern.split("*"))) for pattern in patterns]
    return re.compile("|".join(texts), re.DOTALL).fullmatch


_may_read, _may_write, _is_conditional = map(_matcher, (READS, WRITES, CONDITIONAL))


def _reads(key: str, _pool: str, _conditional: bool) -> bool:
    return bool(_may_read(key))


def _puts(key: str, _pool: str, conditional: bool) -> bool:
    return bool(_may_write(key)) and (conditional or not _is_conditional(key))


def _takes(queue: str, pool: str, _conditional: bool) -> bool:
    return queue == naming.tasks_queue(pool)


def _sends(queue: str, _pool: str, _conditional: bool) -> bool:
    return queue == naming.EVENTS or (queue.startswith("tasks-") and not queue.endswith("-dead"))


def _anything(_name: str, _pool: str, _conditional: bool) -> bool:
    return True


_ALLOWED: dict[str, Callable[[str, str, bool], bool]] = {
    "objects.get": _reads,
    "objects.get_range": _reads,
    "objects.get_if_changed": _reads,
    "objects.head": _reads,
    "objects.download": _reads,
    "objects.list": _anything,
    "objects.put": _puts,
    "objects.upload": _puts,
    "queue.receive": _takes,
    "queue.delete": _takes,
    "queue.change_visibility": _takes,
    "queue.send": _sends,
}


class AccessDenied(BackendError):
    """AWS refuses a call that the role does not allow."""


class Rights:
    """The rights of one simulated worker of a pool.

    `denied` is called with each refused call. `deaf` refuses receives: a lying worker may stop its
    honest part from receiving.
    """

    def __init__(self, denied: Callable[[str], None], pool: str) -> None:
        self._denied = denied
        self._pool = pool
        self.deaf = False

    def check(self, label: str, args: Sequence[Any], *, conditional: bool) -> None:
        """Raise AccessDenied if the role does not allow the call."""
        if self.deaf and label == "queue.receive":
            raise AccessDenied("This worker no longer receives messages.")
        allowed = _ALLOWED.get(label)
        if allowed is not None and allowed(args[0], self._pool, conditional):
            return
        call = f"{label}({', '.join(map(repr, args[:1]))})"
        self._denied(call)
        raise AccessDenied(f"A worker's role does not allow {call}.")
