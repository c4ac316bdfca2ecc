"""Faults of services on every backend: duplicate and late messages, a manager crash, and the loss of the ledger.

Message faults use the Queue port. If the process that injects a fault dies, its messages become visible again after the
visibility timeout, so no message is lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from batchlab.core.errors import BackendError
from batchlab.core.port_retries import patiently
from batchlab.core.ports import MAX_DELAY_S, Message, Outgoing, Queue
from batchlab.core.protocol import object_keys
from batchlab.runtime import factory, manager_process
from batchlab.runtime.home import ManagerRecord
from batchlab.scenarios.faults.target_grid import (
    EFFECT_TIMEOUT_S,
    NOTHING_HIT,
    FaultResult,
    NothingHit,
    Rollback,
    TargetGrid,
    complete,
    in_thread,
    wait_for,
)
from batchlab.scenarios.model.values import Fault

_BATCH = 10
_WAIT_S = 1.0
_HELD_S = 10.0
"""Visibility timeout in seconds of messages that are only inspected."""
_MARGIN_S = 20.0
_PAUSE_S = 0.1
"""Initial pause in seconds between two receives.

The pause doubles after each receive that returns only known messages, because each receive increases a message's
receive count toward the dead-letter limit.
"""


@dataclass
class _QueueState:
    """Messages that were received from one queue.

    `hidden` maps the receipts of messages that are hidden from other consumers to these messages and their receive
    times.
    """

    ids: dict[str, set[str]] = field(default_factory=dict)
    """Ids of the messages with each body, by the body's digest."""
    released: int = 0
    hit: dict[str, str] = field(default_factory=dict)
    """Id of the first message with each affected body, by the body's digest."""
    held_s: list[float] = field(default_factory=list)
    hidden: dict[str, tuple[float, Message]] = field(default_factory=dict)

    def new_messages(self, batch: Sequence[Message]) -> list[Message]:
        """Return the messages of `batch` whose body was not received before."""
        new = []
        for message in batch:
            ids = self.ids.setdefault(_digest(message.body), set())
            if not ids:
                new.append(message)
            ids.add(message.id)
        return new


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _is_hit(message: Message, rate: float) -> bool:
    """Return whether the fault affects the message.

    The decision depends only on the message's body, so the decision is equal for every copy.
    """
    return int(_digest(message.body)[:8], 16) < rate * 16**8


async def duplicates(grid: TargetGrid, fault: Fault) -> FaultResult:
    """Send a second copy of a share of the messages."""

    async def work(queue: Queue, name: str, state: _QueueState, rest_s: Callable[[], float]) -> None:
        async for new, batch in _received_batches(queue, name, state, rest_s, lambda: _HELD_S):
            doubled = [message for message in new if _is_hit(message, fault.rate)]
            for message in doubled:
                await queue.send(name, [Outgoing(message.body)])
                state.hit[_digest(message.body)] = message.id
            valid = await _release(queue, name, state, batch)
            state.released += sum(message.receipt in valid for message in doubled)

    queues, states = await _run_on_queues(grid, fault, work)
    hit, seen = sum(len(state.hit) for state in states), sum(len(state.ids) for state in states)
    again = sum(len(state.ids[digest]) > 1 for state in states for digest in state.hit)
    released = sum(state.released for state in states)
    if not hit:
        raise NothingHit(NOTHING_HIT.format(unit="message"))
    return FaultResult(
        tuple(queues),
        f"{hit} of {seen} received messages were sent a second time, and {released} of the originals returned to the "
        f"queue before another consumer received them; {again} were received again with a second id",
    )


async def delays(grid: TargetGrid, fault: Fault) -> FaultResult:
    """Hide a share of the messages from consumers for some time."""

    async def work(queue: Queue, name: str, state: _QueueState, rest_s: Callable[[], float]) -> None:
        def hidden_s() -> float:
            return min(rest_s(), MAX_DELAY_S) + _MARGIN_S

        async for new, batch in _received_batches(queue, name, state, rest_s, hidden_s):
            late = [message for message in new if _is_hit(message, fault.rate)]
            state.hit |= {_digest(message.body): message.id for message in late}
            await _release(queue, name, state, [message for message in batch if message not in late])
            limit_s = time.monotonic() - MAX_DELAY_S
            due = [message for since_s, message in state.hidden.values() if since_s < limit_s]
            await _release(queue, name, state, due, held=True)

    queues, states = await _run_on_queues(grid, fault, work)
    hit, seen = sum(len(state.hit) for state in states), sum(len(state.ids) for state in states)
    held_s = sorted(seconds for state in states for seconds in state.held_s)
    spread = f", after {held_s[0]:.1f} to {held_s[-1]:.1f} s each" if held_s else ""
    if not hit:
        raise NothingHit(NOTHING_HIT.format(unit="message"))
    return FaultResult(
        tuple(queues),
        f"{hit} of {seen} received messages were hidden, and {len(held_s)} of them returned to the queue{spread}",
    )


async def _release(
    queue: Queue, name: str, state: _QueueState, batch: Sequence[Message], *, held: bool = False
) -> set[str]:
    """Make the messages of `batch` visible again, and return the receipts that were still valid.

    A receipt is valid until another consumer receives the message. If `held` is True, record the time for which each
    message was hidden.
    """
    valid: set[str] = set()
    for start in range(0, len(batch), _BATCH):
        receipts = [message.receipt for message in batch[start : start + _BATCH]]
        refused = await queue.change_visibility(name, [(receipt, 0.0) for receipt in receipts])
        for receipt in receipts:
            since_s, _ = state.hidden.pop(receipt)
            if receipt not in refused:
                valid.add(receipt)
                state.held_s += [time.monotonic() - since_s] * held
    return valid


async def _received_batches(
    queue: Queue, name: str, state: _QueueState, rest_s: Callable[[], float], hide_s: Callable[[], float]
) -> AsyncIterator[tuple[list[Message], list[Message]]]:

    async def receive(wait_s: float) -> list[Message]:
        batch = await queue.receive(name, wait_s=wait_s, visibility_s=hide_s(), max_messages=_BATCH)
        state.hidden.update({message.receipt: (time.monotonic(), message) for message in batch})
        return list(batch)

    pause_s = _PAUSE_S
    while (wait_s := rest_s()) > 0:
        # A canceled receive would hide messages that this process has not recorded.
        batch = await complete(receive(min(_WAIT_S, wait_s)))
        new = state.new_messages(batch)
        if batch:
            yield new, batch
        pause_s = _PAUSE_S if len(new) == len(batch) else 2 * pause_s
        await asyncio.sleep(min(pause_s, max(0.0, rest_s())))


QueueWork = Callable[[Queue, str, _QueueState, Callable[[], float]], Coroutine[Any, Any, None]]


async def _run_on_queues(grid: TargetGrid, fault: Fault, work: QueueWork) -> tuple[list[str], list[_QueueState]]:
    """Run `work` on the task queues of the fault's pools, and on the events queue if the fault does not name a pool."""
    names = [object_keys.tasks_queue(pool) for pool in await grid.pool_names(fault.pool)]
    names += [object_keys.EVENTS] if not fault.pool else []
    ends_s = time.monotonic() + fault.for_s

    def rest_s() -> float:
        return 0.0 if grid.over.is_set() else ends_s - time.monotonic()

    states = {name: _QueueState() for name in names}
    queue = grid.backend.open_queue(grid.home, grid.backend.open_clock())
    patient: Queue = patiently(queue, factory.patience())

    async def release(name: str, state: _QueueState) -> None:
        await _release(patient, name, state, [message for _, message in state.hidden.values()], held=True)

    try:
        async with Rollback(grid.over) as undoing:
            for name, state in states.items():
                undoing.owe(f"the hold on messages of {name}", partial(release, name, state))
            try:
                async with asyncio.TaskGroup() as group:
                    for name, state in states.items():
                        group.create_task(work(patient, name, state, rest_s))
            except* BackendError as errors:
                raise errors.exceptions[0] from None
    finally:
        await queue.close()
    return names, list(states.values())


_MAX_JOBS = 10_000
_PAGE = 1000
NO_JOB = "The ledger had no jobs."


async def crash_manager(grid: TargetGrid, fault: Fault) -> FaultResult:
    """Kill the manager's process on this machine, and start another manager after the fault's duration."""
    owner = (await grid.grid())["owner"]
    running = grid.home.record()
    if running is None:
        raise NothingHit("No manager ran here.")
    started: list[ManagerRecord] = []

    def start() -> None:
        port = urlsplit(running.url).port or 0
        started.append(
            manager_process.start_manager(grid.home, grid.backend, pools=grid.pools, parent=grid.parent, port=port)
        )

    async with Rollback(grid.over) as undoing:
        kill = partial(in_thread, manager_process.kill_manager, grid.home)
        await undoing.breaking("the end of the manager", partial(in_thread, start), kill)
        died_s = time.monotonic()
        await grid.hold(fault.for_s)
    successor = await grid.leader(after=owner)
    return FaultResult(
        (owner,),
        f"{owner} (pid {running.pid}) was killed, and {successor} (pid {started[-1].pid}) led "
        f"{time.monotonic() - died_s:.1f} s later",
    )


async def lose_ledger(
    grid: TargetGrid, fault: Fault, *, before: Callable[[Rollback], Awaitable[str]] | None = None
) -> FaultResult:
    """Empty the ledger, and let the manager rebuild the ledger from the bucket after the fault's duration.

    The function `before`, if given, first breaks the database and returns the evidence of the failure.
    """
    ledger = grid.backend.open_ledger(grid.home)
    rebuilt: list[int] = []

    async def forget() -> bool:
        with suppress(BackendError):  # the database does not answer while the database starts
            await complete(ledger.forget())
            return True
        return False

    try:
        jobs = len(await ledger.jobs(limit=_MAX_JOBS))
        if not jobs:
            raise NothingHit(NO_JOB)
        async with Rollback(grid.over) as undoing:
            add_rebuild(grid, undoing, rebuilt)
            evidence = await before(undoing) if before else ""
            await wait_for(forget, "the ledger's answer", within_s=2 * EFFECT_TIMEOUT_S)
            after = len(await ledger.jobs(limit=_MAX_JOBS))
            held_s = await grid.hold(fault.for_s)
    finally:
        await ledger.close()
    return FaultResult(
        ("ledger",),
        f"{evidence}it had {jobs} jobs, {after} after the loss, and {rebuilt[-1]} after the rebuild from the bucket "
        f"{held_s:.1f} s later",
    )


def add_rebuild(grid: TargetGrid, undoing: Rollback, rebuilt: list[int]) -> None:
    """Register the rebuild of a lost ledger as an undo function.

    The undo function adds the number of rebuilt jobs to `rebuilt`.
    """

    async def rebuild() -> None:
        rebuilt.append(await rebuild_ledger(grid))

    # One try is enough, because `rebuild` waits until a manager answers.
    undoing.owe("the loss of the ledger", rebuild, tries=1)


async def count_jobs(grid: TargetGrid) -> int:
    """Count the jobs that the manager lists."""
    number, last = 0, None
    while page := await asyncio.to_thread(grid.client.jobs, limit=_PAGE, before=last):
        number, last = number + len(page), page[-1]["id"]
    return number


async def rebuild_ledger(grid: TargetGrid) -> int:
    """Let the manager rebuild the ledger and return the number of rebuilt jobs.

    If no manager answers, wait until a manager answers.
    """
    began_s = time.monotonic()
    while True:
        try:
            return await asyncio.to_thread(grid.client.rebuild)
        except BackendError:
            if time.monotonic() - began_s > 2 * EFFECT_TIMEOUT_S:
                raise
            await asyncio.sleep(1.0)
