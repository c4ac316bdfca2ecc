"""Harm to queues through the Queue port itself, so that it is the same on every backend.

Invariant: no message is lost or held for longer than it is meant to be: should this process die, a
visibility timeout gives back what it had.

Harm to what keeps the books: the manager, and the ledger; each comes back by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from batchlab.core.errors import BackendError
from batchlab.core.ports import MAX_DELAY_S, Message, Outgoing, Queue
from batchlab.core.protocol import object_keys
from batchlab.core.retry import patiently
from batchlab.runtime import factory, manager_process
from batchlab.runtime.home import ManagerRecord
from batchlab.scenarios.faults.rollback import Rollback, complete, in_thread
from batchlab.scenarios.faults.target_grid import (
    EFFECT_TIMEOUT_S,
    NOTHING_HIT,
    FaultResult,
    TargetGrid,
    wait_for,
)
from batchlab.scenarios.model.values import Fault

_BATCH = 10
_WAIT_S = 1.0
_HELD_S = 10.0
"""What is received to be looked at comes back after this at the latest."""
_MARGIN_S = 20.0
_PAUSE_S = 0.1
"""Between two looks, twice as long after each that shows what has come by before: a receive counts
against a message's own limit, beyond which it is a dead letter."""


@dataclass
class _QueueState:
    """What has come by in one queue. `taken` are those that nobody else can have now, by their
    receipts, with when they came."""

    ids: dict[str, set[str]] = field(default_factory=dict)
    """The ids that a body came under, by its digest."""
    given_back: int = 0
    hit: dict[str, str] = field(default_factory=dict)
    """Of those that were hit: the first id, by the body's digest."""
    kept_s: list[float] = field(default_factory=list)
    taken: dict[str, tuple[float, Message]] = field(default_factory=dict)

    def fresh(self, batch: Sequence[Message]) -> list[Message]:
        """Those of the batch whose body has not come by before."""
        found = []
        for message in batch:
            seen = self.ids.setdefault(_digest(message.body), set())
            if not seen:
                found.append(message)
            seen.add(message.id)
        return found


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _is_hit(message: Message, rate: float) -> bool:
    """By its body: the same one is hit wherever it comes by."""
    return int(_digest(message.body)[:8], 16) < rate * 16**8


async def duplicates(scene: TargetGrid, fault: Fault) -> FaultResult:
    """Double a share of the messages that come by."""

    async def work(queue: Queue, name: str, met: _QueueState, left_s: Callable[[], float]) -> None:
        async for batch in _received_batches(queue, name, met, left_s, lambda: _HELD_S):
            fresh, everything = batch
            doubled = [one for one in fresh if _is_hit(one, fault.rate)]
            for one in doubled:
                await queue.send(name, [Outgoing(one.body)])
                met.hit[_digest(one.body)] = one.id
            good = await _give_back(queue, name, met, everything)
            met.given_back += sum(one.receipt in good for one in doubled)

    queues, mets = await _run_on_queues(scene, fault, work)
    hit = sum(len(met.hit) for met in mets)
    twice = sum(len(met.ids[digest]) > 1 for met in mets for digest in met.hit)
    given = sum(met.given_back for met in mets)
    came = sum(len(met.ids) for met in mets)
    if not hit:
        return FaultResult(impossible=NOTHING_HIT.format(one="message"))
    return FaultResult(
        tuple(queues),
        f"{hit} of {came} messages that came by were sent a second time, and {given} of those "
        f"originals given back while nobody else had had them; {twice} came by again under a "
        "second id",
    )


async def delays(scene: TargetGrid, fault: Fault) -> FaultResult:
    """Keep a share of the messages that come by from everybody else for a while."""

    async def work(queue: Queue, name: str, met: _QueueState, left_s: Callable[[], float]) -> None:
        def hidden_s() -> float:
            return min(left_s(), MAX_DELAY_S) + _MARGIN_S

        async for fresh, everything in _received_batches(queue, name, met, left_s, hidden_s):
            late = [one for one in fresh if _is_hit(one, fault.rate)]
            met.hit |= {_digest(one.body): one.id for one in late}
            await _give_back(queue, name, met, [one for one in everything if one not in late])
            over_s = time.monotonic() - MAX_DELAY_S
            due = [one for since_s, one in met.taken.values() if since_s < over_s]
            await _give_back(queue, name, met, due, kept=True)

    queues, mets = await _run_on_queues(scene, fault, work)
    hit, came = (sum(len(met.hit) for met in mets), sum(len(met.ids) for met in mets))
    kept_s = sorted(s for met in mets for s in met.kept_s)
    spread = f", {kept_s[0]:.1f} to {kept_s[-1]:.1f} s each" if kept_s else ""
    if not hit:
        return FaultResult(impossible=NOTHING_HIT.format(one="message"))
    return FaultResult(
        tuple(queues),
        f"{hit} of {came} messages that came by were kept back, {len(kept_s)} of them until "
        f"their receipts were given up{spread}",
    )


async def _give_back(
    queue: Queue, name: str, met: _QueueState, batch: Sequence[Message], *, kept: bool = False
) -> set[str]:
    """Make them visible again; the receipts that were still good, since nobody else has had them
    meanwhile. It is noted how long those were `kept` that were to be."""
    good: set[str] = set()
    for start in range(0, len(batch), _BATCH):
        some = [one.receipt for one in batch[start : start + _BATCH]]
        refused = await queue.change_visibility(name, [(one, 0.0) for one in some])
        for receipt in some:
            since_s, _ = met.taken.pop(receipt)
            if receipt not in refused:
                good.add(receipt)
                met.kept_s += [time.monotonic() - since_s] * kept
    return good


async def _take(
    queue: Queue, name: str, met: _QueueState, wait_s: float, hide_s: float
) -> list[Message]:
    """Receive, and note at once what nobody else can have now."""
    batch = await queue.receive(name, wait_s=wait_s, visibility_s=hide_s, max_messages=_BATCH)
    met.taken.update({one.receipt: (time.monotonic(), one) for one in batch})
    return list(batch)


async def _received_batches(
    queue: Queue,
    name: str,
    met: _QueueState,
    left_s: Callable[[], float],
    visible_s: Callable[[], float],
) -> Any:
    """Batches of what comes by until the time is over: those that are new, and all."""
    pause_s = _PAUSE_S
    while (left := left_s()) > 0:
        # One that is cancelled in the middle would have taken what it never tells of.
        batch = await complete(_take(queue, name, met, min(_WAIT_S, left), visible_s()))
        fresh = met.fresh(batch)
        if batch:
            yield fresh, batch
        pause_s = _PAUSE_S if len(fresh) == len(batch) else 2 * pause_s
        await asyncio.sleep(min(pause_s, max(0.0, left_s())))


QueueWork = Callable[[Queue, str, _QueueState, Callable[[], float]], Coroutine[Any, Any, None]]


async def _run_on_queues(
    scene: TargetGrid, fault: Fault, work: QueueWork
) -> tuple[list[str], list[_QueueState]]:
    """Do that in the task queues of the fault's pools, and in that of events where it names none,
    for the fault's time."""
    pools = [pool["name"] for pool in (await scene.grid())["pools"]]
    names = [object_keys.tasks_queue(one) for one in pools if fault.pool in ("", one)]
    names += [object_keys.EVENTS] if not fault.pool else []
    ends_s = time.monotonic() + fault.for_s

    def left_s() -> float:
        return 0.0 if scene.over.is_set() else ends_s - time.monotonic()

    mets = [_QueueState() for _ in names]
    queue = scene.backend.open_queue(scene.home, scene.backend.open_clock())
    patient: Queue = patiently(queue, factory.patience())

    async def release(name: str, met: _QueueState) -> None:
        held = [one for _, one in met.taken.values()]
        await _give_back(patient, name, met, held, kept=True)

    async def in_each() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for name, met in zip(names, mets, strict=True):
                    group.create_task(work(patient, name, met, left_s))
        except* BackendError as errors:
            raise errors.exceptions[0] from None

    try:
        async with Rollback(scene.over) as undoing:
            for name, met in zip(names, mets, strict=True):
                undoing.owe(f"the hold on messages of {name}", partial(release, name, met))
            await in_each()
    finally:
        await queue.close()
    return names, mets


_MOST_JOBS = 10_000
_PAGE = 1000
NO_JOB = "The ledger knew of no job."


class ManagerProcess:
    """Of a grid whose manager is a process of this machine."""

    def __init__(self, scene: TargetGrid) -> None:
        self._scene = scene

    async def crash(self, fault: Fault) -> FaultResult:
        """The manager's process dies; after the fault's time another one is started."""
        scene = self._scene
        before = await scene.grid()
        running = scene.home.record()
        if running is None:
            return FaultResult(impossible="No manager ran here.")
        started: list[ManagerRecord] = []

        def start() -> None:
            started.append(self._start(running.url))

        async with Rollback(scene.over) as undoing:
            await undoing.breaking(
                "the end of the manager",
                partial(in_thread, start),
                partial(in_thread, manager_process.kill_manager, scene.home),
            )
            gone_s = time.monotonic()
            await scene.hold(fault.for_s)
        owner = await scene.leader(after=before["owner"])
        return FaultResult(
            (before["owner"],),
            f"{before['owner']} (pid {running.pid}) was gone, and {owner} led (pid "
            f"{started[-1].pid}) "
            f"{time.monotonic() - gone_s:.1f} s later",
        )

    def _start(self, url: str) -> ManagerRecord:
        scene = self._scene
        return manager_process.start_manager(
            scene.home,
            scene.backend,
            pools=scene.pools,
            parent=scene.parent,
            port=urlsplit(url).port or 0,
        )

    async def lose_ledger(self, fault: Fault) -> FaultResult:
        return await lose_ledger(self._scene, fault)


async def lose_ledger(
    scene: TargetGrid, fault: Fault, *, before: Callable[[Rollback], Awaitable[str]] | None = None
) -> FaultResult:
    """Empty the ledger, and after the fault's time have the manager rebuild it from the bucket.
    `before` is done to the database first, and says what was seen of it."""
    ledger = scene.backend.open_ledger(scene.home)
    found: list[int] = []

    async def forget() -> bool:
        with suppress(BackendError):  # it may be just starting
            await complete(ledger.forget())
            return True
        return False

    try:
        had = len(await ledger.jobs(limit=_MOST_JOBS))
        if not had:
            return FaultResult(impossible=NO_JOB)
        async with Rollback(scene.over) as undoing:
            add_rebuild(scene, undoing, found)
            told = await before(undoing) if before else ""
            await wait_for(forget, "the ledger's answer", within_s=2 * EFFECT_TIMEOUT_S)
            left = len(await ledger.jobs(limit=_MOST_JOBS))
            away_s = await scene.hold(fault.for_s)
    finally:
        await ledger.close()
    return FaultResult(
        ("ledger",),
        f"{told}it had {had} jobs, {left} once it was lost, and {found[-1]} again when it was "
        f"rebuilt from the bucket {away_s:.1f} s later",
    )


def add_rebuild(scene: TargetGrid, undoing: Rollback, found: list[int]) -> None:
    """What is owed to whoever loses a ledger; `found` has how many jobs were rebuilt then."""

    async def rebuild() -> None:
        found.append(await rebuild_ledger(scene))

    # It waits for a manager that is away by itself.
    undoing.owe("the loss of the ledger", rebuild, tries=1)


async def count_jobs(scene: TargetGrid) -> int:
    """How many jobs the manager knows of."""
    number, last = 0, None
    while page := await asyncio.to_thread(scene.client.jobs, limit=_PAGE, before=last):
        number, last = number + len(page), page[-1]["id"]
    return number


async def rebuild_ledger(scene: TargetGrid) -> int:
    """How many jobs the manager has rebuilt; one that is away is waited for."""
    began_s = time.monotonic()
    while True:
        try:
            return await asyncio.to_thread(scene.client.rebuild)
        except BackendError:
            if time.monotonic() - began_s > 2 * EFFECT_TIMEOUT_S:
                raise
            await asyncio.sleep(1.0)
