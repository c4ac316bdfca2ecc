"""Dispatcher of an executor, whose thread sends calls to the grid and sets the results of the calls' futures.

Invariant: every future of the executor gets a result or an error, or is canceled. The dispatcher's thread exists while
the executor has work. Only the dispatcher's thread uses the state of the executor, except for the queue of waiting
calls. Calls that arrive while a batch of calls is being submitted form the next batch. A single call is therefore sent
at once, and ten thousand calls need only a few jobs.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from batchlab.client import task_output, thread_cache
from batchlab.client.futures import Batch, BrokenGridExecutor, Call, CallFuture, Sender, death, revive
from batchlab.client.grid_link import Link
from batchlab.client.job_watch import JobWatch
from batchlab.client.results import decode_all
from batchlab.client.submission import MAP
from batchlab.core.errors import BackendError, JobFailed, TaskFailed, Unreachable, UsageError
from batchlab.core.model import JobId, Json, Outcome
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.worker.executor_calls import Raised

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView

log = logging.getLogger(__name__)

MAX_CALLS = 10_000
"""Maximum number of calls in one batch. The limit lets the calls of one batch run while the next batch is pickled."""


@dataclass(slots=True, eq=False)
class _ThreadRun:
    """One run of the dispatcher's thread, which lasts from the first call until all calls are done."""

    over: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Dispatch:
    """Dispatcher of an executor.

    Every thread may call the public methods of a dispatcher. The dispatcher's thread and the futures refer to the
    dispatcher, and the dispatcher refers to the grid, so the grid stays open while calls run.
    """

    def __init__(self, owner: object, link: Link, sender: Sender, *, show_output: bool = False) -> None:
        """When the last reference to `owner` is dropped, `owner` closes `link`. `show_output` prints the output of the
        calls.
        """
        self._owner = owner
        self._link = link
        self._sender = sender
        self._show_output = show_output
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()
        self._sending = False
        self._shut = False
        self._broken: tuple[str, BaseException] | None = None
        self._turn: _ThreadRun | None = None
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """Queue of functions that the dispatcher's thread calls."""
        self._batches: dict[str, Batch] = {}
        """Batches whose job runs on the grid, by the id of the job."""
        self._watch: JobWatch | None = None
        """Watch of the executor's jobs while the dispatcher's thread runs.

        The watch is None while the executor is idle, because the watch would keep a reference to the dispatcher.
        """
        self._is_canceling = False
        self._abandoned = False

    # --- Methods for any thread ------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Add the call to the next batch, which the dispatcher's thread sends to the grid.

        Raise RuntimeError after `shutdown`. Raise BrokenGridExecutor, a subclass of RuntimeError, if the executor can
        no longer run calls.
        """
        self._check_grid()
        with self._lock:
            self._wake()
            if not self._waiting or self._waiting[-1].whole:
                self._waiting.append(Batch(self._check_later))
            batch = self._waiting[-1]
            batch.calls.append(call)
            batch.whole = len(batch.calls) >= MAX_CALLS

    def submit_all(self, calls: Sequence[Call], *, bundle: int | None) -> None:
        """Send the calls in batches of their own, without calls of `submit`. Raise the errors that `submit` raises."""
        self._check_grid()
        with self._lock:
            self._wake()
            for first in range(0, len(calls), MAX_CALLS):
                batch = Batch(self._check_later, bundle=bundle, whole=True)
                batch.calls += calls[first : first + MAX_CALLS]
                self._waiting.append(batch)

    def shutdown(self, *, wait: bool, cancel: bool) -> None:
        """Refuse all further calls.

        If `cancel` is True, cancel the calls that have not started. If `wait` is True, wait until all calls are done.

        In a forked child process, `shutdown` does nothing, because the calls belong to the parent process.
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
                self._events.put(self._cancel_unstarted)
        for batch in dropped:
            for call in batch.calls:
                call.future.cancel()
                call.future.set_running_or_notify_cancel()
        if wait and turn and turn.thread is not threading.current_thread():
            turn.over.wait()

    def abandon(self) -> None:
        """Cancel all calls, including the calls that run on the grid, without waiting for the end of the calls."""
        self.shutdown(wait=False, cancel=True)
        self._events.put(self._abandon)

    @property
    def is_broken(self) -> bool:
        """Return whether the executor can no longer run calls."""
        return self._broken is not None

    def _check_grid(self) -> None:
        # Check for a fork before the lock is taken, because a forked child may have a copy of a lock that stays held.
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
            # `over` is set after the thread has dropped its reference to the dispatcher, because the drop of the last
            # reference closes the grid.
            thread_cache.run(partial(self._run, turn), turn.over.set)
            thread_cache.delay_exit_until(turn.over)
        except BaseException:
            # Ctrl-C may interrupt the start of the thread. If the thread has started anyway, its call of `_run` returns
            # at once.
            self._turn = None
            raise

    def _error(self) -> BrokenGridExecutor:
        """Return a new exception for each caller, because callers cannot share the traceback of one exception."""
        assert self._broken
        reason, cause = self._broken
        error = BrokenGridExecutor(f"This executor is broken: {reason}")
        error.__cause__ = cause
        return error

    # --- The executor's thread -------------------------------------------------------------------

    def _run(self, turn: _ThreadRun) -> None:
        turn.thread = threading.current_thread()
        with self._lock:
            if self._turn is not turn:
                return
        while True:
            event = self._events.get()
            try:
                event()
            except BaseException as error:
                # An exception in a queued function is a bug in this module. If the exception ended the thread, every
                # caller would wait for its future forever.
                log.critical("an executor has failed", exc_info=True)
                self._break(f"{type(error).__name__}: {error}", error)
            del event  # The queued function may hold the last reference to a future.
            if not self._send_next():
                return

    def _send_next(self) -> bool:
        """Send the next batch of calls. Return False if all work is done."""
        with self._lock:
            if self._sending:
                return True
            if not self._waiting:
                if not self._batches:
                    self._watch = self._turn = None
                return bool(self._batches)
            batch = self._waiting.popleft()
            self._sending = True
        # `_send` does not run on the link's event loop, because `_send` must end even if the link is closed.
        try:
            thread_cache.run(partial(self._send, batch))
        except RuntimeError:  # A thread cannot be started, or Python is exiting.
            self._send(batch)
        return True

    def _send(self, batch: Batch) -> None:
        """Send a batch of calls. `_send` runs on a separate thread, because pickling and the manager's answer may take
        long.
        """

        def on_accepted() -> None:
            self._events.put(partial(self._on_sent, batch, None))

        problem: BaseException | None = None
        try:
            if calls := batch.claim():
                after = self._sender.send(batch, calls, on_accepted, self.outcome)
                if batch.job:
                    self._events.put(partial(self._start_watch, batch, after))
        except BaseException as error:  # noqa: BLE001 - any error ends the batch of calls
            problem = error
        if not batch.job:
            self._events.put(partial(self._on_sent, batch, problem))
        elif problem:
            self._events.put(partial(self._on_loss, batch, problem))

    def _on_sent(self, batch: Batch, problem: BaseException | None) -> None:
        """Record that the submission of a batch has ended. If `problem` is None, the grid has accepted the batch."""
        with self._lock:
            self._sending = False
        rejected, batch.rejected = batch.rejected, []
        for future, rejection in rejected:
            rejection.add_note("The call could not be sent. Use arguments that can be pickled, such as plain data.")
            _end(future, error=rejection)
        if problem:
            self._on_loss(batch, problem)
        elif batch.open:
            self._batches[batch.job] = batch
            self._watch = self._watch or JobWatch(self._link, self)
            if self._broken:
                self._fail(batch, self._error)
            elif self._abandoned:
                self._abandon()
            else:
                self._check_wanted(batch)

    def _start_watch(self, batch: Batch, after: int | None) -> None:
        """Watch the job of the batch for outcomes whose seq is greater than `after`."""
        if batch.job in self._batches and self._watch:
            self._watch.add(batch.job, after)

    # --- Calls of the watch, on the link's thread ------------------------------------------------

    def outcome(self, job: str, outcome: Outcome) -> None:
        self._events.put(partial(self._receive, job, outcome))

    def on_end(self, job: str, view: JobView) -> None:
        self._events.put(partial(self._close, job, view))

    def on_loss(self, job: str, error: Exception) -> None:
        def event() -> None:
            if batch := self._batches.get(job):
                self._on_loss(batch, error)

        self._events.put(event)

    # --- Results ---------------------------------------------------------------------------------

    def _receive(self, job: str, outcome: Outcome) -> None:
        batch = self._batches.get(job)
        if batch is None:
            return
        if self._show_output and any(task in batch.open for task in outcome.bundle.tasks):
            task_output.show(self._link, outcome)
        at = 0
        for start, stop in outcome.succeeded.ranges:
            # The answer to the submission of a job may contain outcomes that the manager lists again later.
            if any(task in batch.open for task in range(start, stop)):
                self._values(batch, range(start, stop), outcome.values[at : at + stop - start])
            at += stop - start
        for failure in outcome.failed:
            if failure.final and (future := batch.open.pop(failure.task, None)):
                _end(future, error=death(outcome, failure))
        if batch.open:
            self._check_wanted(batch)
        else:
            self._remove(batch, cancel=False)

    def _values(self, batch: Batch, tasks: Sequence[int], encoded: Sequence[Json]) -> None:
        remaining = iter(tasks)
        own = JobObjects(JobId(batch.job), is_python=True)
        try:
            for value in decode_all(self._link, batch.job, MAP, tasks, encoded, own):
                self._value(batch.open.pop(next(remaining), None), value)
        except (BackendError, UsageError) as error:
            text = f"The call's result cannot be fetched: {error}"
            for task in remaining:
                if future := batch.open.pop(task, None):
                    _end(future, error=TaskFailed(text, task=task))

    def _value(self, future: CallFuture | None, value: Any) -> None:
        if future is None:
            # The future has its result already. After a rebuild of the ledger, the manager lists outcomes again.
            return
        if not isinstance(value, Raised):
            error = value if isinstance(value, TaskFailed) else None
            _end(future, value, error)
        elif value.initializer:
            cause = revive(value)
            # Executors of concurrent.futures log the error in the same way.
            logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=cause)
            self._break(f"its initializer raised {value.message}", cause)
            _end(future, error=self._error())
        else:
            _end(future, error=revive(value))

    # --- Ends of batches -------------------------------------------------------------------------

    def _check_later(self, batch: Batch) -> None:
        self._events.put(partial(self._check_wanted, batch))

    def _cancel_unstarted(self) -> None:
        self._is_canceling = True
        for batch in self._batches.values():
            self._check_wanted(batch)

    def _abandon(self) -> None:
        self._abandoned = True
        for batch in list(self._batches.values()):
            self._remove(batch, cancel=True)
            for future in batch.drain():
                _end(future, withdrawn=True)

    def _check_wanted(self, batch: Batch) -> None:
        """Cancel the remaining tasks of the batch's job if no caller waits for a result of the job."""
        if batch.ending or batch.job not in self._batches or self._watch is None:
            return
        if batch.abandoned or (self._is_canceling and not batch.has_promised):
            batch.ending = True
            self._watch.cancel_gracefully(batch.job)

    def _close(self, job: str, view: JobView) -> None:
        """End the batch after its job has ended. Calls without a result are canceled, or get an error."""
        batch = self._batches.get(job)
        if batch is None:
            return
        if self._is_closed():
            self._on_loss(batch, Unreachable("The grid was closed.", remedy="Create another Grid."))
        elif batch.ending:
            self._remove(batch, cancel=False)
            for future in batch.drain():
                _end(future, withdrawn=True)
        else:
            reason = f" ({view['reason']})" if view["reason"] else ""
            text = f"Job {job} ended {view['state']}{reason} before the call ended."
            self._fail(batch, lambda: JobFailed(text))

    def _on_loss(self, batch: Batch, error: BaseException) -> None:
        """Set an error as the result of each open call of the batch, because further results cannot arrive."""
        if isinstance(error, Unreachable | CancelledError) or self._is_closed():
            self._break(str(error) or "The grid was closed.", error)
            self._fail(batch, self._error)
        else:
            self._fail(batch, lambda: JobFailed(f"The call is lost: {error}"))

    def _break(self, reason: str, error: BaseException) -> None:
        with self._lock:
            self._broken = self._broken or (reason, error)
            waiting, self._waiting = self._waiting, deque()
        for batch in waiting:
            batch.claim()
        for batch in (*waiting, *self._batches.values()):
            self._fail(batch, self._error)

    def _fail(self, batch: Batch, error: Callable[[], Exception]) -> None:
        self._remove(batch, cancel=True)
        for future in batch.drain():
            _end(future, error=error())

    def _remove(self, batch: Batch, *, cancel: bool) -> None:
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
    """Do nothing. In the queue of functions, `_nothing` only wakes the dispatcher's thread."""


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
    except BaseException:  # A callback of the future raised an exception that concurrent.futures does not catch.
        log.critical("a callback of %r raised", future, exc_info=True)
