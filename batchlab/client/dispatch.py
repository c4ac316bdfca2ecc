"""The thread behind an executor: sends calls to the grid, and brings their results to the futures.

Invariant: every future that was handed in comes to an end. The thread is there while there is
anything to do, and all but the queue of what is to be sent is its own.

While one batch is on its way, the calls that come meanwhile gather and go out together as the next
one: a lone call waits for nobody, and ten thousand cost a few jobs.
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
from batchlab.client.futures import Batch, BrokenGridExecutor, Call, CallFuture, death, revived
from batchlab.client.grid_link import Link
from batchlab.client.job_watch import Watch
from batchlab.client.results import decoded
from batchlab.client.sending import Sender
from batchlab.client.submission import MAP, Outgoing
from batchlab.core.errors import BackendError, JobFailed, TaskFailed, Unreachable, UsageError
from batchlab.core.model import JobId, Json, Outcome
from batchlab.core.protocol.references import Own
from batchlab.worker.executor_calls import Initializer, Raised

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView

log = logging.getLogger(__name__)

MOST = 10_000
"""Calls in one batch: its first ones run while the next batch is being pickled."""


class Turn:
    """From the first call that is to be sent until there is nothing to do any more."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.thread: threading.Thread | None = None


class Dispatch:
    """Callable from any thread; the thread and its futures keep it alive, and it the grid."""

    def __init__(
        self,
        owner: object,
        link: Link,
        outgoing: Outgoing,
        name: str | None,
        initializer: Initializer | None,
    ) -> None:
        """`owner` closes `link` once nothing refers to it any more. `name` is for the jobs."""
        self._owner = owner
        self._link = link
        self._sender = Sender(link, outgoing, name, initializer)
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()
        self._sending = False
        self._shut = False
        self._broken: tuple[str, BaseException] | None = None
        self._turn: Turn | None = None
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        """What is to be done on the thread."""
        self._batches: dict[str, Batch] = {}
        """On the grid, by job."""
        self._watch: Watch | None = None
        """Only while the thread is there, since it refers to us."""
        self._giving_up = False
        self._abandoned = False

    # --- From any thread -------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Send the call, together with others that wait. RuntimeError after `shutdown`, its
        subclass BrokenGridExecutor where no call can be made any more."""
        self._check_grid()
        with self._lock:
            self._wake()
            if not self._waiting or self._waiting[-1].whole:
                self._waiting.append(Batch(self._look_later))
            batch = self._waiting[-1]
            batch.calls.append(call)
            batch.whole = len(batch.calls) >= MOST

    def submit_all(self, calls: Sequence[Call], *, bundle: int | None) -> None:
        """Send these together, and nothing else with them; errors as for `submit`."""
        self._check_grid()
        with self._lock:
            self._wake()
            for first in range(0, len(calls), MOST):
                batch = Batch(self._look_later, bundle=bundle, whole=True)
                batch.calls += calls[first : first + MOST]
                self._waiting.append(batch)

    def shutdown(self, *, wait: bool, cancel: bool) -> None:
        """No further calls; with `cancel` none begins any more; with `wait` all are done.

        Does nothing in a forked child: the calls are its parent's, and the lock may be locked.
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
        """Cancel everything, what runs on the grid too, and do not wait for it."""
        self.shutdown(wait=False, cancel=True)
        self._events.put(self._abandon)

    def _check_grid(self) -> None:
        # Before the lock, which a forked child may have got locked.
        try:
            self._link.check_open()
        except UsageError as error:
            raise BrokenGridExecutor(error.message, remedy=error.remedy) from error

    def _wake(self) -> None:
        if self._broken:
            raise self._error()
        if self._shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if thread_cache.begun():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if not self._sending:
            self._events.put(_nothing)
        if self._turn is None:
            self._start()

    def _start(self) -> None:
        self._turn = turn = Turn()
        try:
            # Over only when the thread has let go of us: we may be what ends the grid.
            thread_cache.run(partial(self._run, turn), turn.over.set)
            thread_cache.put_off_for(turn.over)
        except BaseException:
            # Ctrl-C may come while we wait for it. If it is there all the same, it ends at once.
            self._turn = None
            raise

    def _error(self) -> BrokenGridExecutor:
        """Another one for each who hears of it: a raised exception keeps its traceback."""
        assert self._broken
        told, cause = self._broken
        error = BrokenGridExecutor(f"This executor is broken: {told}")
        error.__cause__ = cause
        return error

    # --- The thread ------------------------------------------------------------------------------

    def _run(self, turn: Turn) -> None:
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
            # A mistake of ours; but every future would wait for ever.
            log.critical("an executor has failed", exc_info=True)
            self._break(f"{type(error).__name__}: {error}", error)

    def _go_on(self) -> bool:
        """Send what waits; False where there is nothing to do."""
        with self._lock:
            if self._sending:
                return True
            if not self._waiting:
                if not self._batches:
                    self._watch = self._turn = None
                return bool(self._batches)
            batch = self._waiting.popleft()
            self._sending = True
        # Not a coroutine of the link's: whatever becomes of that, this one comes to its end.
        try:
            thread_cache.run(partial(self._send, batch))
        except RuntimeError:  # there is no room for a thread, or Python ends
            self._send(batch)
        return True

    def _send(self, batch: Batch) -> None:
        """On a thread of its own: pickling may take long, and so may a busy manager."""
        problem: BaseException | None = None
        try:
            if calls := batch.claim():
                self._submit(batch, calls)
        except BaseException as error:  # noqa: BLE001 - it ends the batch, wherever it came from
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
        """The batch is on the grid, or will never be."""
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
            self._watch = self._watch or Watch(self._link, self)
            if self._broken:
                self._fail(batch, self._error)
            elif self._abandoned:
                self._abandon()
            else:
                self._look(batch)

    def _watch_on(self, batch: Batch, after: int | None) -> None:
        """Nothing has been heard of the batch after that seq."""
        if batch.job in self._batches and self._watch:
            self._watch.add(batch.job, after)

    # --- What the watch hears, on the link's thread ----------------------------------------------

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
            # After a submission's first answer it is listed once more.
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
        own = Own(JobId(batch.job), is_python=True)
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
            return  # had before: after a rebuild of the ledger outcomes are listed again
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
        """Wind up the batch's job if nobody wants what is left of it."""
        if batch.ending or batch.job not in self._batches or self._watch is None:
            return
        if self._giving_up or batch.abandoned:
            batch.ending = True
            self._watch.wind_up(batch.job)

    def _close(self, job: str, view: JobView) -> None:
        """The job has ended; calls that are still open never came to an end."""
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
        """Nothing more will be heard of the batch."""
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
    """Wakes the thread."""


def _end(
    future: CallFuture,
    value: Any = None,
    error: BaseException | None = None,
    *,
    withdrawn: bool = False,
) -> None:
    if future.batch:
        future.batch.settle(future)
    try:
        if withdrawn:
            future.withdraw()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
    except BaseException:  # a Future lets through what is no Exception
        log.critical("a callback of %r raised", future, exc_info=True)
