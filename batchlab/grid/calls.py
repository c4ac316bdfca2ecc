"""An executor's futures, the batches they travel in, and the errors they may end with.

Invariant: a future is of one batch from just before it is RUNNING until just before it is done.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future
from typing import Any

from batchlab.errors import BackendError, TaskFailed
from batchlab.grid.incoming import failed
from batchlab.grid.packing import Call
from batchlab.model import Failure, FailureKind, Outcome
from batchlab.worker.calls import Raised

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
