"""Protocols for the clock, ids, objects, queues, the fleet, its launcher, and notices.

Invariant: all times are seconds unless a name states another unit. Epoch times come from the Clock.
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
    """Source of the time. To wait, use `asyncio.sleep`, which is virtual in the simulator."""

    def now_s(self) -> float:
        """Return seconds since the epoch. They may jump, so do not measure durations with them."""

    def monotonic_s(self) -> float:
        """Return seconds since an arbitrary start. They never go back."""


class Ids(Protocol):
    """Source of new identifiers, for things whose ids are not derived from others."""

    def fresh(self, kind: str) -> str:
        """Return a short id such as `w-3f9c2a`, unique in the grid. `kind` is its prefix."""


# --- Objects (S3) --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object in a listing. `size` is in bytes."""

    key: str
    size: int
    etag: str


class Objects(Protocol):
    """A bucket with read-after-write consistency. Keys are UTF-8, `/`-separated, without `..`."""

    async def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Store `data` and return its ETag.

        With `if_absent`, raise AlreadyExists if the object exists. With `if_match`, raise
        AlreadyExists if its ETag is another one. An adapter that repeats such a put must recognize
        its own earlier write. If it cannot, it raises AlreadyExists, and the caller reads the
        object.
        """

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        """Return the object. Raise NotFound if it does not exist.

        Raise TooLarge, before the content is read, if it has more than `limit` bytes.
        """

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`, exclusive, or to the end of the object."""

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        """Return content and ETag, or None if the ETag is still `etag`.

        Raise NotFound if the object does not exist.
        """

    async def head(self, key: str) -> ObjectInfo | None:
        """Return size and ETag of the object, or None if it does not exist."""

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """Yield pages of objects under `prefix` with keys greater than `after`, in key order."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete these objects, and ignore those that do not exist."""

    async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
        """Store a local file, in parts if it is large, and return its size in bytes.

        With `if_absent`, raise AlreadyExists if the object exists.
        """

    async def download(self, key: str, path: Path) -> int:
        """Write the object to a local file, and return its size in bytes.

        Raise NotFound if the object does not exist.
        """


class LocalFiles(Protocol):
    """Objects of a bucket that are files of this machine, so that a program can read them in
    place."""

    def path(self, key: str) -> Path | None:
        """Return the path of the object's file, or None if the object does not exist."""


# --- Queue (SQS) ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to send. `delay_s` is at most 900."""

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
    """Time at which it was sent, in epoch seconds."""
    first_received_s: float


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """Target configuration of a queue. After `max_receives`, a message moves to `dead_letters`."""

    name: str
    visibility_s: float = 30.0
    retention_s: float = 1_209_600.0
    dead_letters: str | None = None
    max_receives: int = 10


@dataclass(frozen=True, slots=True)
class Depth:
    """Approximate counts of messages, as SQS returns them."""

    visible: int
    in_flight: int
    delayed: int


class Queue(Protocol):
    """Queues by name, with the semantics of SQS standard queues.

    Messages arrive at least once and in any order. A call takes at most 10 entries and 256 KiB.
    Otherwise, it raises TooLarge. `delete` and `change_visibility` either ignore an expired receipt
    or return it as refused. A caller must not rely on either.
    """

    async def ensure(self, spec: QueueSpec) -> None:
        """Create the queue, or change its attributes to `spec`. `dead_letters` must exist."""

    async def send(self, queue: str, messages: Sequence[Outgoing]) -> None:
        """Send up to 10 messages. After an exception, some may have been sent."""

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        """Receive up to `max_messages` (≤ 10), and wait up to `wait_s` (≤ 20) for the first."""

    async def delete(self, queue: str, receipts: Sequence[str]) -> Sequence[str]:
        """Delete up to 10 messages, and return the receipts that were refused."""

    async def change_visibility(self, queue: str, changes: Sequence[tuple[str, float]]) -> Sequence[str]:
        """Set up to 10 visibility timeouts, as (receipt, seconds from now), and return the receipts
        that were refused."""

    async def depth(self, queue: str) -> Depth:
        """Return approximate counts of the queue's messages."""

    async def purge(self, queue: str) -> None:
        """Delete every message."""

    async def remove(self, queue: str) -> None:
        """Delete the queue with its messages, if it exists."""


# --- Fleet (Auto Scaling group) ------------------------------------------------------------------


KEEP_TERMINATED_S = 60.0
"""Time for which a fleet still lists an instance that is Terminated."""


class Fleet(Protocol):
    """Auto Scaling groups, one for each pool. Desired capacity stays within [min, max] (I5)."""

    async def ensure(self, pool: Pool) -> None:
        """Create the pool's group, or change its limits."""

    async def describe(self) -> Sequence[GroupView]:
        """Return every group with its instances. They include those that became Terminated less
        than `KEEP_TERMINATED_S` ago."""

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        """Set the desired capacity. Raise Refused if it is outside [min, max]."""

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        """Terminate the instances gracefully. With `decrement`, desired capacity falls as well."""

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set scale-in protection."""

    async def ready(self, instance: str) -> None:
        """Report the first heartbeat of the instance's worker: Pending becomes InService."""

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Report an instance's health. The group replaces an unhealthy instance."""

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Return scaling activities with their causes, newest first."""

    async def tick(self) -> Sequence[Instance]:
        """Converge one step, and return the instances found dead since the last call.

        A managed service converges by itself, and its adapter only compares. `Instance.note` is the
        cause of the end ("exit -9"). It begins with "terminated" if the group ended the instance.
        """


ANY_MACHINE = Machine()

KEEP_ENDED_S = 600.0
"""Time for which a launcher reports the end of an instance. A fleet asks every few seconds."""


class Launcher(Protocol):
    """Launcher of instances: processes, containers, or coroutines of the simulator."""

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        """Start a worker with the instance id `instance`.

        Launchers that have several types of machines start it on `machine`."""

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """Ask the instance to drain (SIGTERM), and kill it after `grace_s`. Return at once."""

    async def running(self) -> Mapping[str, str | None]:
        """Return every instance until `KEEP_ENDED_S` after its end.

        The value is None while the instance runs, and then the cause of its end ("exit -9").
        """


@dataclass(frozen=True, slots=True)
class Notice:
    """Notice that the platform will terminate this instance.

    `why` is the reason in words. `by_s` is the latest time in epoch seconds, or None if it is
    unknown.
    """

    why: str
    by_s: float | None = None


class Notices(Protocol):
    """Source of the platform's notices to an instance.

    A notice is a Spot interruption, or Terminated as the target lifecycle state.
    """

    async def notice(self) -> Notice | None:
        """Return the current notice, or None if there is none. Raise BackendError if this fails."""
