"""Thread of an executor, which sends calls to the grid and sets the results of their futures.

Invariant: every future of the executor ends. The thread exists while work exists. Only the thread
uses the state of the executor, except for the queue of calls to send. Calls that arrive while a
batch is being sent form the next batch. So a single call is sent at once, and ten thousand calls
need only a few jobs.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from batchlab.client import thread_cache
from batchlab.client.futures import Batch, BrokenGridExecutor, Call, CallFuture, Sender, death, revived
from batchlab.client.grid_link import Link
from batchlab.client.job_watch import JobWatch
from batchlab.client.results import decoded
from batchlab.client.submission import MAP, JobSubmitter
from batchlab.core.errors import BackendError, JobFailed, TaskFailed, Unreachable, UsageError
from batchlab.core.model import JobId, Json, Outcome
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.worker.executor_calls import Initializer, Raised

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView

log = logging.getLogger(__name__)

MAX_CALLS = 10_000
"""Limit of the calls in one batch. The first calls run while the next batch is pickled."""


class _ThreadRun:
    """Lifetime of the thread: from the first call until no work is left."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.thread: threading.Thread | None = None


class Dispatch:
    """Dispatcher of an executor, callable from any thread. The thread and the futures refer to it,
    and it refers to the grid, so the grid stays open."""

    def __init__(
        self, owner: object, link: Link, outgoing: JobSubmitter, name: str | None, initializer: Initializer | None
    ) -> None:
        """`owner` closes `link` when no reference to it exists. `name` is the name of the jobs."""
        self._owner = owner
        self._link = link
        self._sender = Sender(link, outgoing, name, initializer)
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()
        self._sending = False
        self._shut = False
        self._broken: tuple[str, BaseException] | None = None
        self._turn: _ThreadRun | None = None
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """Actions for the thread."""
        self._batches: dict[str, Batch] = {}
        """Batches on the grid, by job."""
        self._watch: JobWatch | None = None
        """Exists only while the thread runs, because it refers to this object."""
        self._giving_up = False
        self._abandoned = False

    # --- Called on any thread --------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Send the call, together with other waiting calls. Raise RuntimeError after `shutdown`,
        and its subclass BrokenGridExecutor if the executor can no longer run calls."""
        self._check_grid()
        with self._lock:
            self._wake()
            if not self._waiting or self._waiting[-1].whole:
                self._waiting.append(Batch(self._look_later))
            batch = self._waiting[-1]
            batch.calls.append(call)
            batch.whole = len(batch.calls) >= MAX_CALLS

    def submit_all(self, calls: Sequence[Call], *, bundle: int | None) -> None:
        """Send these calls without other calls in their batches. The errors are those of
        `submit`."""
        self._check_grid()
        with self._lock:
            self._wake()
            for first in range(0, len(calls), MAX_CALLS):
                batch = Batch(self._look_later, bundle=bundle, whole=True)
                batch.calls += calls[first : first + MAX_CALLS]
                self._waiting.append(batch)

    def shutdown(self, *, wait: bool, cancel: bool) -> None:
        """Accept no further calls. With `cancel`, cancel the calls that have not begun. With
        `wait`, wait for all calls.

        Do nothing in a forked child, because the calls belong to its parent and the lock may be
        held.
        """
        if self._link.forked:
            return
        with self._lock:
            self._shut = True
            turn = self._turn
            dropped: list[Batch] = []
            if cancel:
                dropped += self._waiting
                self._waiting.clear()
                self._events.put(self._give_up)
        for batch in dropped:
            for call in batch.calls:
                call.future.cancel()
                call.future.set_running_or_notify_cancel()
        if wait and turn and turn.thread is not threading.current_thread():
            turn.over.wait()

    def abandon(self) -> None:
        """Cancel all calls, including those that run on the grid, and do not wait."""
        self.shutdown(wait=False, cancel=True)
        self._events.put(self._abandon)

    def _check_grid(self) -> None:
        # Before the lock, because a forked child may have a copy of a held lock.
        try:
            self._link.check_open()
        except UsageError as error:
            raise BrokenGridExecutor(error.message, remedy=error.remedy) from error

    def _wake(self) -> None:
        if self._broken:
            raise self._error()
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if thread_cache.is_exiting():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if not self._sending:
            self._events.put(_nothing)
        if self._turn is None:
            self._start()

    def _start(self) -> None:
        self._turn = turn = _ThreadRun()
        try:
            # `over` is set only after the thread has dropped its reference to this object, because
            # that may close the grid.
            thread_cache.run(partial(self._run, turn), turn.over.set)
            thread_cache.delay_exit_until(turn.over)
        except BaseException:
            # Ctrl-C may interrupt the start of the thread. If the thread runs anyway, it ends at
            # once.
            self._turn = None
            raise

    def _error(self) -> BrokenGridExecutor:
        """Return a new exception for each caller, because a raised exception keeps its
        traceback."""
        assert self._broken
        told, cause = self._broken
        error = BrokenGridExecutor(f"This executor is broken: {told}")
        error.__cause__ = cause
        return error

    # --- The executor's thread -------------------------------------------------------------------

    def _run(self, turn: _ThreadRun) -> None:
        turn.thread = threading.current_thread()
        with self._lock:
            if self._turn is not turn:
                return
        while True:
            self._do(self._events.get())
            if not self._go_on():
                return

    def _do(self, event: Callable[[], None]) -> None:
        try:
            event()
        except BaseException as error:
            # A bug in this module. Without this handler, every future would wait forever.
            log.critical("an executor has failed", exc_info=True)
            self._break(f"{type(error).__name__}: {error}", error)

    def _go_on(self) -> bool:
        """Send the next batch. Return False if no work is left."""
        with self._lock:
            if self._sending:
                return True
            if not self._waiting:
                if not self._batches:
                    self._watch = self._turn = None
                return bool(self._batches)
            batch = self._waiting.popleft()
            self._sending = True
        # Not a coroutine of the link, because this function must end even if the link is closed.
        try:
            thread_cache.run(partial(self._send, batch))
        except RuntimeError:  # no thread can be started, or Python is exiting
            self._send(batch)
        return True

    def _send(self, batch: Batch) -> None:
        """Send a batch on a thread of its own, because pickling or a busy manager may take long."""
        problem: BaseException | None = None
        try:
            if calls := batch.claim():
                self._submit(batch, calls)
        except BaseException as error:  # noqa: BLE001 - any error ends the batch
            problem = error
        if not batch.job:
            self._events.put(partial(self._sent, batch, problem))
        elif problem:
            self._events.put(partial(self._lost, batch, problem))

    def _submit(self, batch: Batch, calls: Sequence[Call]) -> None:
        def accepted() -> None:
            self._events.put(partial(self._sent, batch, None))

        after = self._sender.send(batch, calls, accepted, self.outcome)
        if batch.job:
            self._events.put(partial(self._watch_on, batch, after))

    def _sent(self, batch: Batch, problem: BaseException | None) -> None:
        """Handle the end of the submission. The batch is on the grid, or `problem` prevented
        that."""
        with self._lock:
            self._sending = False
        rejected, batch.rejected = batch.rejected, []
        for future, rejection in rejected:
            rejection.add_note("The call could not be sent. Give it plain data, or what makes it.")
            _end(future, error=rejection)
        if problem:
            self._lost(batch, problem)
        elif batch.open:
            self._batches[batch.job] = batch
            self._watch = self._watch or JobWatch(self._link, self)
            if self._broken:
                self._fail(batch, self._error)
            elif self._abandoned:
                self._abandon()
            else:
                self._look(batch)

    def _watch_on(self, batch: Batch, after: int | None) -> None:
        """JobWatch the batch for outcomes after that seq."""
        if batch.job in self._batches and self._watch:
            self._watch.add(batch.job, after)

    # --- Called by the watch on the link's thread ------------------------------------------------

    def outcome(self, job: str, outcome: Outcome) -> None:
        self._events.put(partial(self._take, job, outcome))

    def ended(self, job: str, view: JobView) -> None:
        self._events.put(partial(self._close, job, view))

    def lost(self, job: str, error: Exception) -> None:
        def tell() -> None:
            if batch := self._batches.get(job):
                self._lost(batch, error)

        self._events.put(tell)

    # --- Results ---------------------------------------------------------------------------------

    def _take(self, job: str, outcome: Outcome) -> None:
        batch = self._batches.get(job)
        if batch is None:
            return
        at = 0
        for start, stop in outcome.succeeded.ranges:
            # The first answer to a submission may contain outcomes that are listed again later.
            if any(task in batch.open for task in range(start, stop)):
                self._values(batch, range(start, stop), outcome.values[at : at + stop - start])
            at += stop - start
        for failure in outcome.failed:
            if failure.final and (future := batch.open.pop(failure.task, None)):
                _end(future, error=death(outcome, failure))
        if batch.open:
            self._look(batch)
        else:
            self._forget(batch, cancel=False)

    def _values(self, batch: Batch, tasks: Sequence[int], encoded: Sequence[Json]) -> None:
        left = iter(tasks)
        own = JobObjects(JobId(batch.job), is_python=True)
        try:
            for value in decoded(self._link, batch.job, MAP, tasks, encoded, own):
                self._value(batch.open.pop(next(left), None), value)
        except (BackendError, UsageError) as error:
            told = f"The call's result cannot be fetched: {error}"
            for task in left:
                if future := batch.open.pop(task, None):
                    _end(future, error=TaskFailed(told, task=task))

    def _value(self, future: CallFuture | None, value: Any) -> None:
        if future is None:
            return  # a repeated result: after a rebuild of the ledger, outcomes are listed again
        if not isinstance(value, Raised):
            error = value if isinstance(value, TaskFailed) else None
            _end(future, value, error)
        elif value.initializer:
            self._break(f"its initializer raised {value.told}", revived(value))
            _end(future, error=self._error())
        else:
            _end(future, error=revived(value))

    # --- Ending ----------------------------------------------------------------------------------

    def _look_later(self, batch: Batch) -> None:
        self._events.put(partial(self._look, batch))

    def _give_up(self) -> None:
        self._giving_up = True
        for batch in self._batches.values():
            self._look(batch)

    def _abandon(self) -> None:
        self._abandoned = True
        for batch in list(self._batches.values()):
            self._forget(batch, cancel=True)
            for future in batch.drain():
                _end(future, withdrawn=True)

    def _look(self, batch: Batch) -> None:
        """Cancel the rest of the batch's job if no reader waits for its results."""
        if batch.ending or batch.job not in self._batches or self._watch is None:
            return
        if self._giving_up or batch.abandoned:
            batch.ending = True
            self._watch.wind_up(batch.job)

    def _close(self, job: str, view: JobView) -> None:
        """Handle the end of the job. The calls that are still open will get no result."""
        batch = self._batches.get(job)
        if batch is None:
            return
        if self._is_closed():
            self._lost(batch, Unreachable("The grid was closed.", remedy="Make another Grid."))
        elif batch.ending:
            self._forget(batch, cancel=False)
            for future in batch.drain():
                _end(future, withdrawn=True)
        else:
            reason = f" ({view['reason']})" if view["reason"] else ""
            told = f"Job {job} ended {view['state']}{reason} before the call had."
            self._fail(batch, lambda: JobFailed(told))

    def _lost(self, batch: Batch, error: BaseException) -> None:
        """Handle an error after which the batch gets no more results."""
        if isinstance(error, Unreachable | CancelledError) or self._is_closed():
            self._break(str(error) or "The grid was closed.", error)
            self._fail(batch, self._error)
        else:
            self._fail(batch, lambda: JobFailed(f"The call is lost: {error}"))

    def _break(self, told: str, error: BaseException) -> None:
        with self._lock:
            self._broken = self._broken or (told, error)
            waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            batch.claim()
        for batch in (*waiting, *self._batches.values()):
            self._fail(batch, self._error)

    def _fail(self, batch: Batch, error: Callable[[], Exception]) -> None:
        self._forget(batch, cancel=True)
        for future in batch.drain():
            _end(future, error=error())

    def _forget(self, batch: Batch, *, cancel: bool) -> None:
        if self._batches.pop(batch.job, None) and self._watch:
            self._watch.drop(batch.job)
            self._link.leave(batch.job, cancel=cancel)

    def _is_closed(self) -> bool:
        try:
            self._link.check_open()
        except UsageError:
            return True
        return False


def _nothing() -> None:
    """Do nothing. This event only wakes the thread."""


def _end(future: CallFuture, value: Any = None, error: BaseException | None = None, *, withdrawn: bool = False) -> None:
    if future.batch:
        future.batch.settle(future)
    try:
        if withdrawn:
            future.withdraw()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
    except BaseException:  # a Future does not catch exceptions that are not an Exception
        log.critical("a callback of %r raised", future, exc_info=True)
