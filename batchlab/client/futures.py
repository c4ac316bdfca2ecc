"""An executor's futures, the batches they travel in, and the errors they may end with.

Invariant: a future is of one batch from just before it is RUNNING until just before it is done.

An executor's calls on their way: functions pickled once, arguments encoded.

Invariant: a call that cannot be pickled is rejected by itself, and the others go.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchlab.client.pickling import Shipping, pickled
from batchlab.client.results import failed
from batchlab.client.submission import Chunk
from batchlab.core.errors import BackendError, TaskFailed
from batchlab.core.model import Failure, FailureKind, JobId, Json, Outcome
from batchlab.core.protocol import values
from batchlab.manager.jobs.stage_plans import PART_ITEMS
from batchlab.worker.executor_calls import Calls, Initializer, Raised

KNOWN = 4096
"""So many functions are remembered as having been sent."""

_PLAIN = frozenset({type(None), bool, int, float, str})


@dataclass(slots=True)
class Call:
    """`function(*args, **kwargs)`, wanted by `future`."""

    future: CallFuture
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Packed:
    """The handler, pickled; and the calls as items, in the order of `futures`."""

    handler: bytes
    chunks: list[Chunk]
    futures: list[CallFuture]
    rejected: list[tuple[CallFuture, Exception]]


class Packer:
    """Packs the calls of one executor."""

    def __init__(self, shipping: Shipping, initializer: Initializer | None) -> None:
        self._shipping = shipping
        self._initializer = initializer
        self._known: dict[bytes, None] = {}

    def pack(self, job: JobId, calls: Sequence[Call]) -> Packed:
        """Encode these as the items of `job`."""
        with self._shipping.by_value():
            functions = self._functions(calls)
            table: dict[bytes, int] = {}
            packed = Packed(b"", [], [], [])
            for call in calls:
                if not len(packed.futures) % PART_ITEMS:
                    chunk = Chunk(len(packed.futures), [], [])
                try:
                    function = _reference(call.function, functions.get(id(call.function)), table)
                    item = [function, *_arguments(call, chunk, job)]
                except Exception as error:  # noqa: BLE001 - pickling runs the objects' own code
                    packed.rejected.append((call.future, error))
                    continue
                if not chunk.items:
                    packed.chunks.append(chunk)
                chunk.items.append(item)
                packed.futures.append(call.future)
        packed.handler = pickle.dumps(Calls(list(table), self._initializer))
        return packed

    def _functions(self, calls: Sequence[Call]) -> dict[int, tuple[bytes, bool]]:
        """By id, each function that can be pickled, and whether it belongs into the table.

        The table is sent once, however often its functions are called, but every process loads
        all of it: what is called once (a bound method, a partial) goes with its call.
        """
        found: dict[int, bytes] = {}
        uses: Counter[bytes] = Counter()
        for call in calls:
            key = id(call.function)
            if key not in found:
                with suppress(Exception):  # raised again where the call is packed
                    found[key] = pickled(call.function)
            if key in found:
                uses[found[key]] += 1
        shared = {}
        for data, count in uses.items():
            digest = hashlib.sha256(data).digest()
            shared[data] = count > 1 or digest in self._known
            self._known[digest] = None
        while len(self._known) > KNOWN:
            del self._known[next(iter(self._known))]
        return {key: (data, shared[data]) for key, data in found.items()}


def _reference(
    function: Callable[..., Any], known: tuple[bytes, bool] | None, table: dict[bytes, int]
) -> Json:
    if not callable(function):
        raise TypeError(f"{function!r} is not callable")
    # Where it is not known it could not be pickled, and each of its calls gets an error of its own.
    data, shared = known or (pickled(function), False)
    if shared:
        return table.setdefault(data, len(table))
    return {"$pickle": base64.b64encode(data).decode()}


def _arguments(call: Call, chunk: Chunk, job: JobId) -> list[Json]:
    try:
        if not call.kwargs and all(type(one) in _PLAIN for one in call.args):
            return [values.encode_object(one) for one in call.args]
        return [values.encode_object((call.args, call.kwargs), chunk.file(job))]
    except values.NotAValue as error:
        if error.__cause__ is None:
            raise
        # pickle's own error, which the user of any executor may expect.
        raise error.__cause__ from None


_DEATHS = (FailureKind.CRASH, FailureKind.EXIT, FailureKind.MEMORY, FailureKind.LOST)


class BrokenGridExecutor(BackendError, BrokenExecutor):
    """The executor can run nothing any more: the grid was closed, its manager cannot be reached,
    or the initializer raised."""


class WorkerDied(TaskFailed, BrokenExecutor):
    """The call ended its process: a crash, `os._exit`, out of memory. No other call is concerned,
    and the executor goes on."""


class RemoteTraceback(Exception):
    """The cause of an exception that a call raised: `tb` is the traceback from the worker."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


def death(outcome: Outcome, failure: Failure) -> TaskFailed:
    """The error for a call that the grid could not make."""
    return failed(outcome, failure, WorkerDied if failure.kind in _DEATHS else TaskFailed)


def revived(raised: Raised) -> BaseException:
    """What the call raised, if it can be unpickled here, else a TaskFailed that tells of it."""
    try:
        error = pickle.loads(raised.pickled) if raised.pickled else None  # noqa: S301 - by our job
    except Exception:  # noqa: BLE001 - unpickling an exception calls its class, which may do anything
        error = None
    if not isinstance(error, BaseException):
        return TaskFailed(raised.told, traceback=raised.traceback)
    error.__cause__ = RemoteTraceback(raised.traceback)
    return error


class CallFuture(Future[Any]):
    """The future of a call, RUNNING from when it is sent: no process here knows when a worker
    begins. From then on `cancel` returns False, and the future ends with the call's result."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: Batch | None = None
        self.unwanted = False
        self._withdrawn = False

    def cancel(self) -> bool:
        return super().cancel() or self._withdrawn

    def disown(self) -> None:
        """Cancel the call, whose future has no reader any more. If it was sent, it is cancelled
        once no other call of its job has a reader and unless it has begun."""
        if not self.cancel() and (batch := self.batch):
            batch.unwant(self)

    def cancelled(self) -> bool:
        return self._withdrawn or super().cancelled()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if self._withdrawn:
            raise CancelledError
        return error

    def withdraw(self) -> None:
        """The call will never run. A Future has no public way from RUNNING to CANCELLED."""
        self._withdrawn = True
        self.set_exception(CancelledError())


class Batch:
    """Calls that make one job."""

    def __init__(
        self, look: Callable[[Batch], None], *, bundle: int | None = None, whole: bool = False
    ) -> None:
        """`look` is called, on any thread, once nothing of it is wanted any more. `bundle` fixes
        how many calls travel together; nothing may join a `whole` one."""
        self.calls: list[Call] = []
        self.bundle = bundle
        self.whole = whole
        self.job = ""
        self.open: dict[int, CallFuture] = {}
        """By task, those that are not done."""
        self.rejected: list[tuple[CallFuture, Exception]] = []
        """Calls that could not be sent."""
        self.ending = False
        self._look = look
        self._lock = threading.Lock()
        self._left = 0
        self._unwanted = 0

    @property
    def abandoned(self) -> bool:
        """Nothing that is left of it is wanted."""
        return self._unwanted >= self._left

    def claim(self) -> list[Call]:
        """The calls that nobody has cancelled; from now on nobody can."""
        calls, self.calls = self.calls, []
        with self._lock:
            self._left += len(calls)
        wanted = []
        for call in calls:
            # In this order, or a wish to cancel it could find neither a future that may be
            # cancelled nor a batch.
            call.future.batch = self
            if call.future.set_running_or_notify_cancel():
                wanted.append(call)
            else:
                self.settle(call.future)
        self.open = {n: call.future for n, call in enumerate(wanted)}
        return wanted

    def drain(self) -> list[CallFuture]:
        """What is still open, which is nothing afterwards."""
        futures, self.open = list(self.open.values()), {}
        return futures

    def settle(self, future: CallFuture) -> None:
        """The future is about to be done."""
        with self._lock:
            self._left -= 1
            self._unwanted -= future.unwanted
            future.batch = None

    def unwant(self, future: CallFuture) -> None:
        """No reader waits for this future."""
        with self._lock:
            if future.unwanted or future.batch is None:
                return
            future.unwanted = True
            self._unwanted += 1
            if not self.abandoned:
                return
        self._look(self)
