"""Futures of an executor, their batches and errors, and the encoding and submission of a batch.

Invariant: a future belongs to a batch from just before it is RUNNING until just before it is done. If a call cannot be
pickled, only this call fails, and the other calls of the batch are sent. An accepted batch stays accepted, even if the
request for its first results fails.
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
from typing import TYPE_CHECKING, Any

from batchlab.client.grid_link import Link
from batchlab.client.results import failed, outcomes
from batchlab.client.submission import MAP, Chunk, JobSubmitter, ObjectPickler, job_name, pickled
from batchlab.core.errors import BackendError, TaskFailed, UsageError
from batchlab.core.job_definition import StageDef
from batchlab.core.model import Failure, FailureKind, JobId, Json, Outcome
from batchlab.core.protocol import json_format, values
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.stage_plans import PART_ITEMS
from batchlab.worker.executor_calls import Calls, Initializer, Raised

if TYPE_CHECKING:
    from batchlab.core.api_types import OutcomeView

MAX_KNOWN_FUNCTIONS = 4096
"""Maximum number of sent functions that are remembered."""

_PLAIN = frozenset({type(None), bool, int, float, str})


@dataclass(slots=True)
class Call:
    """The call `function(*args, **kwargs)` and the future of the call."""

    future: CallFuture
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Packed:
    """Packed calls: the pickled handler, and the calls as items in the order of `futures`."""

    handler: bytes
    chunks: list[Chunk]
    futures: list[CallFuture]
    rejected: list[tuple[CallFuture, Exception]]


class Packer:
    """Packer that pickles the calls of one executor."""

    def __init__(self, shipping: ObjectPickler, initializer: Initializer | None) -> None:
        self._shipping = shipping
        self._initializer = initializer
        self._sent: dict[bytes, None] = {}

    def pack(self, job: JobId, calls: Sequence[Call]) -> Packed:
        """Encode the calls as the items of `job`."""
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
        """Return each function that can be pickled, by id, and whether the function belongs in the table of functions.

        The table of functions is sent once for all calls, but every worker process loads the whole table. A function
        that is called once (a bound method, a partial) is sent with its call.
        """
        functions: dict[int, bytes] = {}
        uses: Counter[bytes] = Counter()
        for call in calls:
            key = id(call.function)
            if key not in functions:
                with suppress(Exception):  # `_reference` raises the pickling error again for each call
                    functions[key] = pickled(call.function)
            if key in functions:
                uses[functions[key]] += 1
        shared = {}
        for data, count in uses.items():
            digest = hashlib.sha256(data).digest()
            shared[data] = count > 1 or digest in self._sent
            self._sent[digest] = None
        while len(self._sent) > MAX_KNOWN_FUNCTIONS:
            del self._sent[next(iter(self._sent))]
        return {key: (data, shared[data]) for key, data in functions.items()}


def _reference(function: Callable[..., Any], entry: tuple[bytes, bool] | None, table: dict[bytes, int]) -> Json:
    if not callable(function):
        raise TypeError(f"{function!r} is not callable")
    # A function without an entry could not be pickled. Each call of a function without an entry gets its own error.
    data, shared = entry or (pickled(function), False)
    if shared:
        return table.setdefault(data, len(table))
    return {"$pickle": base64.b64encode(data).decode()}


def _arguments(call: Call, chunk: Chunk, job: JobId) -> list[Json]:
    try:
        if not call.kwargs and all(type(arg) in _PLAIN for arg in call.args):
            return [values.encode_object(arg) for arg in call.args]
        return [values.encode_object((call.args, call.kwargs), chunk.file(job))]
    except values.NotAValue as error:
        if error.__cause__ is None:
            raise
        # The error is pickle's own error, which users of executors expect.
        raise error.__cause__ from None


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
    """Cause of an exception that a call raised. `tb` is the traceback from the worker."""

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return f'\n"""\n{self.tb}"""'


def death(outcome: Outcome, failure: Failure) -> TaskFailed:
    """Return the error of a call that the grid could not run."""
    return failed(outcome, failure, WorkerDied if failure.kind in _PROCESS_ENDS else TaskFailed)


def revived(raised: Raised) -> BaseException:
    """Return the exception that the call raised.

    If the exception cannot be unpickled in this process, return a TaskFailed with the text of the exception.
    """
    try:
        error = pickle.loads(raised.pickled) if raised.pickled else None  # noqa: S301 - pickled by this job
    except Exception:  # noqa: BLE001 - unpickling runs the code of the exception's class
        error = None
    if not isinstance(error, BaseException):
        return TaskFailed(raised.told, traceback=raised.traceback)
    error.__cause__ = RemoteTraceback(raised.traceback)
    return error


class CallFuture(Future[Any]):
    """Future of a call on the grid.

    A future is RUNNING after its call was sent, because this process does not know when a worker starts the call. The
    `cancel` method of a RUNNING future returns False, and the future ends with the call's result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch: Batch | None = None
        self.unwanted = False
        self._withdrawn = False

    def cancel(self) -> bool:
        return super().cancel() or self._withdrawn

    def disown(self) -> None:
        """Cancel the call, because no caller waits for it. A call that was sent and has not started is canceled when no
        caller waits for any call of its job.
        """
        if not self.cancel() and (batch := self.batch):
            batch.mark_unwanted(self)

    def cancelled(self) -> bool:
        return self._withdrawn or super().cancelled()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if self._withdrawn:
            raise CancelledError
        return error

    def withdraw(self) -> None:
        """Mark the call as canceled. The base class Future does not offer the change from RUNNING to CANCELLED."""
        self._withdrawn = True
        self.set_exception(CancelledError())


class Batch:
    """Calls of an executor that form one job."""

    def __init__(self, on_unwanted: Callable[[Batch], None], *, bundle: int | None = None, whole: bool = False) -> None:
        """`on_unwanted` is called, on any thread, when no caller waits for a result of the batch any longer.

        `bundle` sets the number of calls in a bundle. No further call can join a batch that is `whole`.
        """
        self.calls: list[Call] = []
        self.bundle = bundle
        self.whole = whole
        self.job = ""
        self.open: dict[int, CallFuture] = {}
        """Futures of the batch that are not done, by task."""
        self.rejected: list[tuple[CallFuture, Exception]] = []
        """Calls of the batch that could not be sent, with their errors."""
        self.ending = False
        self._on_unwanted = on_unwanted
        self._lock = threading.Lock()
        self._remaining = 0
        self._unwanted = 0

    @property
    def abandoned(self) -> bool:
        """Return whether no caller waits for any remaining call."""
        return self._unwanted >= self._remaining

    def claim(self) -> list[Call]:
        """Return the calls that are not canceled, and mark their futures as RUNNING.

        A RUNNING future cannot be canceled.
        """
        calls, self.calls = self.calls, []
        with self._lock:
            self._remaining += len(calls)
        wanted = []
        for call in calls:
            # The batch of a future is set before the state RUNNING, so that a concurrent cancellation finds no RUNNING
            # future without a batch.
            call.future.batch = self
            if call.future.set_running_or_notify_cancel():
                wanted.append(call)
            else:
                self.settle(call.future)
        self.open = {n: call.future for n, call in enumerate(wanted)}
        return wanted

    def drain(self) -> list[CallFuture]:
        """Remove and return the open futures of the batch."""
        futures, self.open = list(self.open.values()), {}
        return futures

    def settle(self, future: CallFuture) -> None:
        """Remove the future from the batch just before the future is done."""
        with self._lock:
            self._remaining -= 1
            self._unwanted -= future.unwanted
            future.batch = None

    def mark_unwanted(self, future: CallFuture) -> None:
        """Record that no caller waits for the future."""
        with self._lock:
            if future.unwanted or future.batch is None:
                return
            future.unwanted = True
            self._unwanted += 1
            if not self.abandoned:
                return
        self._on_unwanted(self)


FIRST_S = 0.2
"""Time in seconds that the submission of a batch waits for first results.

The wait saves a second request for short calls.
"""

OnOutcome = Callable[[str, Outcome], None]
"""Callback that receives a job's id and an outcome."""


class Sender:
    """Sender of the batches of one executor. The methods of a Sender run on the caller's thread."""

    def __init__(self, link: Link, outgoing: JobSubmitter, name: str | None, initializer: Initializer | None) -> None:
        """`name` is the name of the jobs."""
        self._link = link
        self._outgoing = outgoing
        self._packer = Packer(outgoing.shipping, initializer)
        self._name = name

    def send(
        self, batch: Batch, calls: Sequence[Call], accepted: Callable[[], None], on_outcome: OnOutcome
    ) -> int | None:
        """Submit all calls that can be packed as the job of the batch.

        Return the seq of the last outcome that `on_outcome` received.

        `accepted` is called once, when the manager has accepted the job of the batch. Raise the error that prevents the
        submission. No error is raised after the manager has accepted the job.
        """
        stage = StageDef(MAP, retry=RetryRule(attempts=1), bundle=batch.bundle)
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
            return None  # the watch of the job will report the same error
