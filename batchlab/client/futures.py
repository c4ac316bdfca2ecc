"""Futures of an executor, the batches of calls that form jobs, the errors of calls, and the submission of a batch.

Invariant: a future belongs to a batch from just before the future's state is RUNNING until just before the future is
done. If a call cannot be pickled, only the future of this call gets an error, and the other calls of the batch are
sent. A batch that the manager has accepted runs, even if the request for the batch's first results fails.
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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchlab.client.grid_link import Link
from batchlab.client.results import outcomes, task_failure
from batchlab.client.submission import Chunk, JobSubmitter, ObjectPickler, Pickled, job_name
from batchlab.client.task_errors import unpickle
from batchlab.core.errors import BackendError, JobFailed, TaskFailed, UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Failure, FailureKind, JobId, Json, Outcome
from batchlab.core.protocol import json_format, values
from batchlab.manager.stage_plans import PART_ITEMS
from batchlab.worker.executor_calls import Calls, Initializer, Raised

if TYPE_CHECKING:
    from batchlab.core.api_types import OutcomeView

MAX_KNOWN_FUNCTIONS = 4096
"""Maximum number of sent functions whose hash an executor remembers."""
MAX_INLINE_FUNCTION_BYTES = 16 * 1024
"""Maximum size of a pickled function that is sent with its call. A larger function is stored once."""

_PLAIN = frozenset({type(None), bool, int, float, str})


@dataclass(slots=True)
class Call:
    """A call `function(*args, **kwargs)` that a user submitted, and the future of the call."""

    future: CallFuture
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Packed:
    """Calls in the form of a job: the pickled handler, and one item for each call. The items have the order of
    `futures`.
    """

    handler: bytes
    chunks: list[Chunk]
    futures: list[CallFuture]
    rejected: list[tuple[CallFuture, Exception]]


class Packer:
    """Encoder of the calls of one executor as items of jobs."""

    def __init__(self, pickler: ObjectPickler, initializer: Pickled | None = None, owner: str = "") -> None:
        """`owner` is the unique name of the executor, whose initializer each process runs once."""
        self._pickler = pickler
        self._initializer = Initializer(owner, initializer.data) if initializer else None
        self._initializer_shared = initializer.shared if initializer else {}
        self._sent: dict[bytes, None] = {}

    def pack(self, job: JobId, calls: Sequence[Call]) -> Packed:
        """Encode the calls as the items of the job `job`."""
        with self._pickler.by_value():
            functions = self._functions(calls)
            table: dict[bytes, int] = {}
            packed = Packed(b"", [], [], [])
            for call in calls:
                if not len(packed.futures) % PART_ITEMS:
                    chunk = Chunk(len(packed.futures), [], [])
                try:
                    pickled, is_shared = functions.get(id(call.function)) or (self._pickle(call.function), False)
                    item = [
                        _reference(pickled, table, is_shared=is_shared),
                        *self._arguments(call, pickled, chunk, job),
                    ]
                except Exception as error:  # noqa: BLE001 - pickling runs code of the pickled objects
                    packed.rejected.append((call.future, error))
                    continue
                if not chunk.items:
                    packed.chunks.append(chunk)
                chunk.items.append(item)
                packed.futures.append(call.future)
        packed.handler = pickle.dumps(Calls(list(table), self._initializer))
        return packed

    def _pickle(self, function: Callable[..., Any]) -> Pickled:
        if not callable(function):
            raise TypeError(f"{function!r} is not callable")
        return self._pickler.call(function)

    def _arguments(self, call: Call, function: Pickled, chunk: Chunk, job: JobId) -> list[Json]:
        shared = {**self._initializer_shared, **function.shared}
        try:
            if not shared and not call.kwargs and all(type(arg) in _PLAIN for arg in call.args):
                return [values.encode_object(arg) for arg in call.args]
            return [values.encode_object((call.args, call.kwargs, *shared.values()), chunk.file(job))]
        except values.NotAValue as error:
            if error.__cause__ is None:
                raise
            # Raise the error of pickle itself, because users of executors expect an error of pickle.
            raise error.__cause__ from None

    def _functions(self, calls: Sequence[Call]) -> dict[int, tuple[Pickled, bool]]:
        """Return a pair for each function, by `id(function)`: the pickled function, and whether the function is in the
        table of functions.

        A function that several calls share is in the table of functions, which is sent once, but which every worker
        process loads. A small function that is called once, such as a bound method or a partial, is sent with its
        call. A function that cannot be pickled is left out.
        """
        functions: dict[int, Pickled] = {}
        uses: Counter[bytes] = Counter()
        for call in calls:
            key = id(call.function)
            if key not in functions:
                # `pack` pickles the function again for each call, and raises a new error.
                with suppress(Exception):
                    functions[key] = self._pickle(call.function)
            if key in functions:
                uses[functions[key].data] += 1
        shared = {}
        for data, count in uses.items():
            digest = hashlib.sha256(data).digest()
            shared[data] = count > 1 or digest in self._sent or len(data) > MAX_INLINE_FUNCTION_BYTES
            self._sent[digest] = None
        while len(self._sent) > MAX_KNOWN_FUNCTIONS:
            del self._sent[next(iter(self._sent))]
        return {key: (pickled, shared[pickled.data]) for key, pickled in functions.items()}


def _reference(function: Pickled, table: dict[bytes, int], *, is_shared: bool) -> Json:
    if is_shared:
        return table.setdefault(function.data, len(table))
    return {"$pickle": base64.b64encode(function.data).decode()}


_PROCESS_ENDS = (FailureKind.CRASH, FailureKind.EXIT, FailureKind.MEMORY, FailureKind.LOST)


class BrokenGridExecutor(BackendError, BrokenExecutor):
    """The executor can no longer run calls, because the grid was closed, its manager is
    unreachable, or the initializer raised.
    """


class WorkerDied(TaskFailed, BrokenExecutor):
    """The call ended its process by a crash, by `os._exit`, or because of its memory limit.

    The death of a worker does not affect other calls, and the executor continues.
    """


class RemoteTraceback(Exception):
    """Cause of an exception that a call raised. `tb` is the text of the traceback on the worker."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


def death(outcome: Outcome, failure: Failure) -> TaskFailed:
    """Return the error for a call that failed permanently without an exception of its own, such as a crash."""
    return task_failure(outcome, failure, WorkerDied if failure.kind in _PROCESS_ENDS else TaskFailed)


def revive(raised: Raised) -> BaseException:
    """Unpickle the exception that a call raised on a worker.

    If the exception cannot be unpickled in this process, return a TaskFailed with the text of the exception.
    """
    error = unpickle(raised.pickled) if raised.pickled else None
    if error is None:
        return TaskFailed(raised.message, traceback=raised.traceback)
    error.__cause__ = RemoteTraceback(raised.traceback)
    return error


class CallFuture(Future[Any]):
    """Future of a call on the grid.

    A future is RUNNING after its call was sent, because this process does not know when a worker starts the call. The
    `cancel` method of a RUNNING future returns False, and the future is never canceled later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch: Batch | None = None
        self.unwanted = False
        self.promised = False
        """Whether `cancel` has returned False, so that the caller counts on the result of the call."""
        self._withdrawn = False

    def cancel(self) -> bool:
        if self._cancel():
            return True
        with self._condition:
            self.promised = not self._withdrawn
        return self._withdrawn

    def _cancel(self) -> bool:
        return super().cancel() or self._withdrawn

    def disown(self) -> None:
        """Record that the caller does not wait for the call. A call that was not sent is canceled at once. A call that
        was sent and has not started is canceled when no caller waits for a call of the same job.
        """
        if not self._cancel() and (batch := self.batch):
            batch.mark_unwanted(self)

    def cancelled(self) -> bool:
        return self._withdrawn or super().cancelled()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if self._withdrawn:
            raise CancelledError
        return error

    def withdraw(self) -> None:
        """Mark a RUNNING future as canceled, which the base class Future does not support.

        If `cancel` has returned False, the future gets an error instead.
        """
        with self._condition:
            self._withdrawn = not self.promised
        self.set_exception(
            CancelledError() if self._withdrawn else JobFailed("The call was canceled together with its executor.")
        )


class Batch:
    """Calls of an executor that form one job."""

    def __init__(self, on_unwanted: Callable[[Batch], None], *, bundle: int | None = None, whole: bool = False) -> None:
        """`on_unwanted` is called when no caller waits for a result of the batch any longer. The call may come from any
        thread.

        `bundle` sets the number of calls in a bundle. If `whole` is True, the batch does not accept further calls.
        """
        self.calls: list[Call] = []
        self.bundle = bundle
        self.whole = whole
        self.job = ""
        self.open: dict[int, CallFuture] = {}
        """Futures of the batch that are not done, by the number of the call's task."""
        self.rejected: list[tuple[CallFuture, Exception]] = []
        """Calls of the batch that could not be sent, with their errors."""
        self.ending = False
        self._on_unwanted = on_unwanted
        self._lock = threading.Lock()
        self._remaining = 0
        self._unwanted = 0

    @property
    def abandoned(self) -> bool:
        """Return whether the callers have stopped waiting for all remaining calls of the batch."""
        return self._unwanted >= self._remaining

    @property
    def has_promised(self) -> bool:
        """Return whether `cancel` has returned False for a call of the batch that is not done."""
        return any(future.promised for future in list(self.open.values()))

    def claim(self) -> list[Call]:
        """Return the calls of the batch that are not canceled, and mark the futures of these calls as RUNNING.

        A RUNNING future cannot be canceled.
        """
        calls, self.calls = self.calls, []
        with self._lock:
            self._remaining += len(calls)
        wanted = []
        for call in calls:
            # The batch of a future is set before the state RUNNING, so that a concurrent cancellation finds a batch for
            # each RUNNING future.
            call.future.batch = self
            if call.future.set_running_or_notify_cancel():
                wanted.append(call)
            else:
                self.settle(call.future)
        self.open = {n: call.future for n, call in enumerate(wanted)}
        return wanted

    def drain(self) -> list[CallFuture]:
        """Remove the futures that are not done from the batch, and return the removed futures."""
        futures, self.open = list(self.open.values()), {}
        return futures

    def settle(self, future: CallFuture) -> None:
        """Remove a future from the batch. The caller sets the result of the future right after `settle`."""
        with self._lock:
            self._remaining -= 1
            self._unwanted -= future.unwanted
            future.batch = None

    def mark_unwanted(self, future: CallFuture) -> None:
        """Record that no caller waits for the result of the future."""
        with self._lock:
            if future.unwanted or future.batch is None:
                return
            future.unwanted = True
            self._unwanted += 1
            if not self.abandoned:
                return
        self._on_unwanted(self)


FIRST_S = 0.2
"""Time in seconds for which the submission of a batch waits for the batch's first results.

If short calls end during the wait, their results do not need a second request.
"""

OnOutcome = Callable[[str, Outcome], None]
"""Callback that receives a job's id and an outcome."""


class Sender:
    """Sender of the batches of one executor. The methods of a Sender run on the caller's thread."""

    def __init__(self, link: Link, outgoing: JobSubmitter, packer: Packer, name: str | None, stage: StageDef) -> None:
        """`name` is the name of the submitted jobs, or None for the name of the first call's function. `stage` has the
        pool and the slots of the calls.
        """
        self._link = link
        self._outgoing = outgoing
        self._packer = packer
        self._name = name
        self._stage = stage

    def send(
        self, batch: Batch, calls: Sequence[Call], accepted: Callable[[], None], on_outcome: OnOutcome
    ) -> int | None:
        """Submit the calls as the job of the batch, without the calls that cannot be pickled.

        Return the seq of the last outcome that `on_outcome` received, or None.

        `accepted` is called once, when the manager has accepted the job of the batch. An error that prevents the
        submission of the job is raised. BackendError and UsageError after the acceptance of the job are ignored.
        """
        stage = replace(self._stage, bundle=batch.bundle)
        draft = self._outgoing.draft(job_name(calls[0].function, self._name), stage)
        packed = self._packer.pack(draft.id, calls)
        batch.open = dict(enumerate(packed.futures))
        batch.rejected = packed.rejected

        def on_accepted() -> None:
            if not batch.job:
                batch.job = draft.id
                accepted()

        async def read(views: Sequence[OutcomeView]) -> None:
            async for outcome in outcomes(self._link, views):
                on_outcome(batch.job, outcome)

        try:
            page = self._outgoing.send(draft, packed.handler, packed.chunks, on_accepted, wait_s=FIRST_S)
            if isinstance(page, Outcome):
                on_outcome(batch.job, page)
                return None
            views = page["outcomes"] if page else []
            if all(view["outcome"] for view in views):
                for view in views:
                    on_outcome(batch.job, json_format.outcome_from_json(view["outcome"]))
            else:
                self._link.run(read(views))
            return views[-1]["seq"] if views else None
        except (BackendError, UsageError):
            if not batch.job:
                raise
            return None  # If the error persists, the watch of the job reports the error.
