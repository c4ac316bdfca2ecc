"""Clock, objects, queue and fleet, and the seams inside the worker and the fleet, as Protocols.

Invariant: all times are seconds unless a name says otherwise; epoch times come from the Clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from batchlab.core.model import Activity, GroupView, Instance, Machine, Pool

MAX_MESSAGE_BYTES = 256 * 1024
MAX_BATCH = 10
MAX_DELAY_S = 900.0
MAX_VISIBILITY_S = 43_200.0
MAX_WAIT_S = 20.0


class Clock(Protocol):
    """Time from outside. Waiting is `asyncio.sleep`, which the simulator's loop makes virtual."""

    def now_s(self) -> float:
        """Seconds since the epoch; may jump, so never subtract two of them to measure."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start; never goes back."""


class Ids(Protocol):
    """Fresh identifiers from outside, for the few things that are not derived."""

    def fresh(self, kind: str) -> str:
        """A short id such as `w-3f9c2a`, unique within the grid. `kind` is its prefix."""


# --- Objects (S3) --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing; `size` in bytes."""

    key: str
    size: int
    etag: str


class Objects(Protocol):
    """A bucket. Read-after-write consistent; keys are UTF-8, `/`-separated, without `..`."""

    async def put(
        self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None
    ) -> str:
        """Store `data`, return its ETag.

        With `if_absent` (S3: `If-None-Match: *`) raises AlreadyExists where the key is taken. An
        adapter that retries such a put by itself must recognise its own earlier write and not
        raise for it; where it cannot tell, AlreadyExists is right, and the caller reads.
        """

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        """The whole object; NotFound where there is none. TooLarge, before any of it is read, if it
        has more than `limit` bytes."""

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` up to but not including `stop`, cut off at the end of the object."""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """Content and ETag, None while the ETag is still `etag`; NotFound where there is none."""

    async def head(self, key: str) -> ObjectInfo | None:
        """Facts about one object, None where there is none."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """Pages of objects under `prefix`, in key order, with keys greater than `after`."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Remove these; a key that is not there is no error."""

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        """Store a local file by streaming (multipart), return its size in bytes. AlreadyExists if
        the key is taken and `if_absent`."""

    async def download(self, key: str, path: Path) -> int:
        """Fetch into a local file by streaming, return its size in bytes; NotFound as `get`."""


class LocalFiles(Protocol):
    """Objects of a bucket that are files of this machine, so that they can be read in place."""

    def path(self, key: str) -> Path | None:
        """Return the path of the object's file, or None if there is no such object."""


# --- Queue (SQS) ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send; `delay_s` is at most 900."""

    body: str
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """A received message. `receive_count` counts this receive, so it is 1 the first time."""

    id: str
    body: str
    receipt: str
    receive_count: int
    sent_s: float
    """Epoch seconds at which it was sent."""
    first_received_s: float


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue as it should be. `max_receives` moves a message to `dead_letters` beyond it."""

    name: str
    visibility_s: float = 30.0
    retention_s: float = 1_209_600.0
    dead_letters: str | None = None
    max_receives: int = 10


@dataclass(frozen=True, slots=True)
class Depth:
    """Approximate counts, as SQS gives them."""

    visible: int
    in_flight: int
    delayed: int


class Queue(Protocol):
    """Queues addressed by name, with the semantics of SQS standard queues: at least once, any
    order, at most 10 entries a call and 256 KiB a call; more is TooLarge.

    A receipt that is no longer ours: `delete` and `change_visibility` skip it silently or return
    it in their answer, as the service does; a caller must not rely on either.
    """

    async def ensure(self, spec: QueueSpec) -> None:
        """Create it, or bring its attributes to `spec`. `dead_letters` must exist already."""

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        """Send up to 10. All or an exception; after one, some may have been sent."""

    async def receive(
        self,
        queue: str,
        *,
        max_messages: int = 10,
        wait_s: float = 20.0,
        visibility_s: float | None = None,
    ) -> Sequence[Message]:
        """Up to `max_messages` (≤ 10), waiting up to `wait_s` (≤ 20) for the first."""

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        """Delete up to 10; returns those receipts that were refused."""

    async def change_visibility(
        self, queue: str, changes: Sequence[tuple[str, float]]
    ) -> Sequence[str]:
        """Set (receipt, seconds from now) for up to 10; returns the receipts that were refused."""

    async def depth(self, queue: str) -> Depth:
        """Approximate counts."""

    async def purge(self, queue: str) -> None:
        """Drop every message."""

    async def remove(self, queue: str) -> None:
        """Delete the queue with its messages; no error where there is none."""


# --- Fleet (Auto Scaling group) ------------------------------------------------------------------


KEEP_TERMINATED_S = 60.0
"""How long a fleet still tells of an instance that is Terminated."""


class Fleet(Protocol):
    """Auto Scaling groups, one per pool. I5 is kept here: never outside [min, max]."""

    async def ensure(self, pool: Pool) -> None:
        """Create the pool's group, or change its limits."""

    async def describe(self) -> Sequence[GroupView]:
        """Every group with its instances, those included that became Terminated less than
        `KEEP_TERMINATED_S` ago."""

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """Set desired capacity; Refused outside [min, max]."""

    async def terminate(
        self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str
    ) -> None:
        """Terminate named instances gracefully, with `decrement` lowering desired capacity."""

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set scale-in protection."""

    async def ready(self, instance: str) -> None:
        """The instance's worker has given its first sign of life: Pending becomes InService."""

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Report an instance's health; an unhealthy one is replaced."""

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Scaling activities with their causes, newest first."""

    async def tick(self) -> Sequence[Instance]:
        """Converge one step; returns the instances found dead since the last call.

        A managed service converges by itself; its adapter only compares. `Instance.note` says how
        one died ("exit -9"), and begins with "terminated" where the group itself ended it.
        """


ANY_MACHINE = Machine()

KEEP_ENDED_S = 600.0
"""How long a launcher still knows the end of an instance; a fleet looks every few seconds."""


class Launcher(Protocol):
    """How an instance comes to be: a process, a container, a coroutine in the simulator."""

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        """Start a worker that knows itself as `instance`; where machines differ, on such a one."""

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """Ask it to drain (SIGTERM), kill it after `grace_s`; returns at once."""

    async def running(self) -> Mapping[str, str | None]:
        """Every instance known, for `KEEP_ENDED_S` beyond its end: None while it lives, else how it
        ended ("exit -9")."""


@dataclass(frozen=True, slots=True)
class Notice:
    """That this instance will be taken away: `why` in words, at the latest `by_s` (seconds of the
    epoch; None where nobody says when)."""

    why: str
    by_s: float | None = None


class Notices(Protocol):
    """What the platform tells an instance about its own end: a Spot interruption, a lifecycle
    state that is Terminated."""

    async def notice(self) -> Notice | None:
        """The notice that stands, None while the instance may go on; BackendError where nobody
        can be asked."""
