"""Wrappers of ports, which add latency, faults, and log lines, and prevent effects of a dead actor's calls.

Invariant: every port call of a wrapped actor can have one fault, and adds one line to the event log.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, TypeVar, cast

from batchlab.core.errors import Throttled, Unreachable
from batchlab.core.ports import MAX_DELAY_S
from batchlab.sim.actors import Actor, ActorKilled, Pause
from batchlab.sim.event_log import EventLog, brief
from batchlab.sim.faults import CREATE, LATE_S, FaultKind, Faults, Point
from batchlab.sim.runtime_checks import Watch
from batchlab.sim.worker_rights import Rights

T = TypeVar("T")


class _NoAnswer(Enum):
    """Text that a log line has in place of the answer of a call."""

    END = "end"
    CANCELLED = "cancelled"
    KILLED = "killed"


_INSTANT = Point("", 0, 0.0, 0.0, 1.0, 0.0)


def wrap(
    inner: T,
    port: str,
    actor: Actor,
    faults: Faults | None = None,
    log: EventLog | None = None,
    watch: Watch | None = None,
    rights: Rights | None = None,
    stream: str = "",
) -> T:
    """Return a wrapper of the port `inner` for one actor.

    `port` is the name of the port in the log. The faults of a queue apply only to calls of the port "queue". `rights`
    refuses the calls that the actor's role does not allow. Calls with a `stream` are numbered separately, so that they
    do not change the faults of the actor's other calls.

    Without faults and log, return `inner` itself. The unwrapped port costs no time, but prevents a kill of the actor.
    An actor can be killed if it has a source of faults, even with rates and latencies of 0.
    """
    if faults is None and log is None:
        actor.guarded = False
        return inner
    # The wrapper is a dynamic proxy with the type of its target. Explicit wrappers of five protocols would need 40
    # methods that only delegate and follow every change of the ports.
    return cast(T, _Port(inner, port, actor, faults, log, watch, rights, actor.name + stream))


@dataclass(eq=False, repr=False)
class _Port:
    _inner: Any
    _port: str
    _actor: Actor
    _faults: Faults | None
    _log: EventLog | None
    _watch: Watch | None
    _rights: Rights | None
    _source: str
    _pause: Pause = field(default_factory=Pause)

    def __getattr__(self, name: str) -> Any:
        # Python calls `__getattr__` only once per method, because the wrapper is stored on the instance.
        target = getattr(self._inner, name)
        if not callable(target):
            return target
        make = self._call if inspect.iscoroutinefunction(target) else self._plain
        method = make(f"{self._port}.{name}", target)
        setattr(self, name, method)
        return method

    def _call(self, label: str, target: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
        is_watched = self._log is not None or self._watch is not None or self._rights is not None
        perform = self._perform if is_watched else self._perform_unwatched

        def call(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            return perform(label, target, args, kwargs)

        def change(change: Any) -> Awaitable[Any]:
            # The log names each kind of change, such as "ledger.Fold".
            return perform(f"{self._port}.{type(change).__name__}", target, (change,), {})

        return change if label == "ledger.apply" else call

    def _plain(self, label: str, target: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._check()
            result = target(*args, **kwargs)
            if isinstance(result, AsyncIterator):
                return self._pages(label, result, (args, kwargs))
            return result

        return call

    async def _pages(self, label: str, inner: AsyncIterator[Any], shown: tuple[Any, Any]) -> AsyncIterator[Any]:
        # Each page is a separate request, so each page is a separate fault point.
        step = partial(anext, inner, _NoAnswer.END)
        try:
            while (page := await self._perform(label, step, (), {}, shown)) is not _NoAnswer.END:
                yield page
        finally:
            # Without an explicit close, the garbage collector would close the generator in a loop that may have ended.
            if isinstance(inner, AsyncGenerator):
                await inner.aclose()

    async def _perform(
        self,
        label: str,
        target: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shown: tuple[Any, Any] | None = None,
    ) -> Any:
        """Perform a call. The log has the arguments `shown`, or else the arguments of the call."""
        shown = shown or (args, kwargs)
        self._check()
        point = _INSTANT if self._faults is None else self._faults.next(self._source)
        try:
            if point.request_s:
                await self._pause(point.request_s)
        except asyncio.CancelledError:
            self._note(point, None, label, shown, _NoAnswer.CANCELLED)
            raise
        return await self._arrive(label, target, args, kwargs, shown, point)

    async def _perform_unwatched(
        self, label: str, target: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Perform a call without a log and without checks. Most calls of a forecast do not have a fault."""
        self._check()
        faults = self._faults
        assert faults is not None, "a port without faults and log has no wrapper"
        point = faults.next(self._source)
        if point.request_s:
            await self._pause(point.request_s)
        if point.answer_s or not faults.is_plain(point, _kind_of(label, kwargs)):
            return await self._arrive(label, target, args, kwargs, (args, kwargs), point)
        try:
            result = await target(*args, **kwargs)
        except Exception:
            self._check()
            raise
        # A kill cancels every wait, but the code behind the port may have caught the cancellation.
        self._check()
        return result

    async def _arrive(
        self,
        label: str,
        target: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shown: tuple[Any, Any],
        point: Point,
    ) -> Any:
        """Perform a call whose request has arrived at the service."""
        faults = self._faults
        kind: FaultKind | None = None
        extra_s = 0.0
        result: Any = None
        error: Exception | None = None
        try:
            effect = _kind_of(label, kwargs)
            self._check_rights(label, shown[0], conditional=effect is CREATE)
            if faults is not None:
                kind = faults.strike(point, effect)
            target = self._intercept(target, label, point)
            if kind is None or faults is None:
                result = await target(*args, **kwargs)
            else:
                late_s, extra_s = faults.delay_s(point) if kind is FaultKind.DELAYED else (0.0, 0.0)
                self._disturb(late_s + extra_s)
                await self._before(point, kind, late_s, label, shown)
                result = await _effect(kind, point, target, args, kwargs)
            if self._watch is not None:
                self._watch.on_call(self._actor, label, args, result)
        except asyncio.CancelledError:
            self._note(point, kind, label, shown, _NoAnswer.CANCELLED)
            raise
        except Exception as raised:  # noqa: BLE001 - raised below, when the answer has arrived
            error = raised
        # A kill cancels every wait, but the code behind the port may have caught the cancellation.
        self._check()
        self._note(point, kind, label, shown, result if error is None else error)
        if kind is FaultKind.KILL_AFTER:
            self._die()
        takes_s = point.answer_s + (faults.slow_s(point, label) if faults is not None else 0.0)
        if takes_s or extra_s:
            received = result if label == "queue.receive" and kind is not FaultKind.ANSWER_LOST else []
            await self._answer(takes_s, extra_s, args, received)
        self._acknowledge(label, args)
        if kind is not None:
            self._disturb(0.0)
        if kind is FaultKind.ANSWER_LOST:
            raise Unreachable(f"{label}: the answer was lost.") from error
        if error is not None:
            raise error
        return result

    def _check_rights(self, label: str, args: Sequence[Any], *, conditional: bool) -> None:
        if self._rights is not None:
            self._rights.check(label, args, conditional=conditional)

    def _acknowledge(self, label: str, args: Sequence[Any]) -> None:
        # A writer that finds another writer's object has also waited until the found object is on the disk.
        if label == "objects.put" and self._watch is not None:
            self._watch.unsynced.on_acknowledge(args[0])

    async def _answer(self, takes_s: float, extra_s: float, args: tuple[Any, ...], received: Sequence[Any]) -> None:
        if extra_s:
            # The fault is recorded again, because a receive has waited for a message since the fault was drawn.
            self._disturb(extra_s)
        try:
            await self._pause(takes_s + extra_s)
        except asyncio.CancelledError:
            # A port promises that a canceled receive does not lose messages. An SQS adapter can only make a lost
            # message visible again, and a dead process cannot call SQS.
            if received and self._actor.alive:
                await self._inner.change_visibility(args[0], [(message.receipt, 0.0) for message in received])
            raise

    def _intercept(
        self, target: Callable[..., Awaitable[Any]], label: str, point: Point
    ) -> Callable[..., Awaitable[Any]]:
        """Return `target`, or the substitute of a test that intercepts port calls."""
        intercept = self._faults.intercept if self._faults is not None else None
        if intercept is None:
            return target
        return lambda *args, **kwargs: intercept(self._actor, point.call, label, partial(target, *args, **kwargs))

    def _disturb(self, for_s: float) -> None:
        if self._watch is not None:
            self._watch.on_fault(self._actor, for_s)

    async def _before(self, point: Point, kind: FaultKind, late_s: float, label: str, shown: Any) -> None:
        if late_s:
            await asyncio.sleep(late_s)
        if kind is FaultKind.KILL_BEFORE:
            self._note(point, kind, label, shown, _NoAnswer.KILLED)
            self._die()
        if kind is FaultKind.THROTTLED:
            raise Throttled(f"{label} is throttled.")
        if kind is FaultKind.UNREACHABLE:
            raise Unreachable(f"{label} does not answer.")
        if kind is FaultKind.CONFLICT:
            raise Throttled(f"{label}: 409, another request for this key is under way.")

    def _check(self) -> None:
        if not self._actor.alive:
            raise ActorKilled(self._actor.name)

    def _die(self) -> None:
        self._actor.kill()
        raise ActorKilled(self._actor.name)

    def _note(self, point: Point, kind: FaultKind | None, label: str, shown: Any, result: object) -> None:
        if self._log is None or not self._actor.alive:
            return
        args, kwargs = shown
        texts = [brief(arg) for arg in args]
        texts += [f"{name}={brief(value)}" for name, value in kwargs.items()]
        fault = f" !{kind.value}" if kind is not None else ""
        answer = result.value if isinstance(result, _NoAnswer) else brief(result)
        self._log.add(self._actor.name, f"#{point.call} {label}({', '.join(texts)}){fault} -> {answer}")


def _kind_of(label: str, kwargs: Mapping[str, Any]) -> str:
    """Return the kind of a call, which decides the faults that apply to the call."""
    return CREATE if kwargs and (kwargs.get("if_absent") or kwargs.get("if_match")) else label


async def _effect(
    kind: FaultKind,
    point: Point,
    target: Callable[..., Awaitable[Any]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Perform a call of the queue port with its fault, such as a lost or repeated message."""
    if kind is FaultKind.DROPPED:
        await target(*args, **kwargs)
        return []
    if kind in (FaultKind.LOST, FaultKind.DUPLICATED, FaultKind.LATE):
        return await _send(kind, point, target, *args, **kwargs)
    return await target(*args, **kwargs)


async def _send(
    kind: FaultKind, point: Point, target: Callable[..., Awaitable[Any]], queue: str, messages: Sequence[Any]
) -> None:
    chosen, fraction = divmod(point.pick * len(messages), 1)
    target_message = messages[int(chosen)]
    rest = [message for i, message in enumerate(messages) if i != chosen]
    if kind is FaultKind.DUPLICATED:
        await target(queue, messages)
        await target(queue, [target_message])
        return
    if rest:
        await target(queue, rest)
    if kind is FaultKind.LATE:
        low, high = LATE_S
        late_s = min(MAX_DELAY_S, target_message.delay_s + low + (high - low) * fraction)
        await target(queue, [replace(target_message, delay_s=late_s)])
