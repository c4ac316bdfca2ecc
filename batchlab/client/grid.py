"""The Python API: a grid as a context manager, functions mapped over items, job files run.

Invariant: whoever waits here for a job and stops waiting, by an error, Ctrl-C or a loop left early,
has it cancelled.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from batchlab.client.grid_link import POLL_S, Link
from batchlab.client.http import Client
from batchlab.client.results import Incoming, decoded
from batchlab.client.submission import MAP, Outgoing, job_name
from batchlab.core.errors import JobFailed, TaskFailed, UsageError
from batchlab.core.job_definition import JobDef, RetryRule, StageDef
from batchlab.core.model import ENDED, Pool
from batchlab.core.protocol.references import Own
from batchlab.runtime import factory
from batchlab.runtime.home import find_home

if TYPE_CHECKING:
    from batchlab.client.executor import GridExecutor
    from batchlab.client.job_result import JobResult
    from batchlab.core.api_types import JobView

__all__ = ["Grid"]

PathText = str | os.PathLike[str]


class MapOptions(TypedDict, total=False):
    """What `map` and `starmap` may be told; see `map`."""

    name: str | None
    timeout_s: float | None
    retry: RetryRule | int | None
    bundle: int | None
    ordered: bool
    return_exceptions: bool


class Grid:
    """A grid in a folder: brought up, and taken down by `close`, unless one is up there already.

    Usable from several threads. Best as a context manager; one that is left open is closed when
    nothing refers to it any more, or when Python ends.
    """

    def __init__(
        self,
        backend: str = "local",
        *,
        home: PathText | None = None,
        workers: int | None = None,
        pools: Sequence[Pool] = (),
        warm: bool = False,
    ) -> None:
        """`home` is the grid's folder; None means BATCHLAB_HOME, else `.batchlab` here.

        `workers` sizes the default pool from 0 to so many instances of one slot; `pools` are the
        pools instead; with neither, the backend's own. `warm` keeps them at their largest. All
        three are for a grid that is not up yet: UsageError where one is.
        """
        descriptor = factory.load(backend)
        sized = _sized(descriptor.pools, workers, pools, warm=warm)
        self._link = Link(descriptor, find_home(Path(home) if home else None), sized)
        # Unlike __del__, this runs at the interpreter's end too.
        self._end = weakref.finalize(self, self._link.close)
        self._outgoing = Outgoing(self._link)

    @property
    def client(self) -> Client:
        """The manager's HTTP API."""
        return self._link.client

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        retry: RetryRule | int | None = None,
        bundle: int | None = None,
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> Generator[Any, None, None]:
        """`function(item)`, or `function(item, ctx)`, of every item, run on the grid's workers.

        All items are drawn and submitted before this returns. Results come in the order of the
        items, with `ordered=False` as they are there. A task that failed raises TaskFailed in its
        place and cancels the rest; with `return_exceptions` its TaskFailed comes as a result, and
        the others go on. An iterator that is dropped or closed cancels what is left.

        `timeout_s` is for each task. `retry` is a rule or a number of attempts; by default a task
        that raises is not tried again. A worker's death is never a task's failure. `bundle` fixes
        how many tasks travel together. UsageError, and nothing submitted, for what cannot be
        pickled.
        """
        return self._map(
            function,
            items,
            name=name,
            timeout_s=timeout_s,
            retry=retry,
            bundle=bundle,
            ordered=ordered,
            return_exceptions=return_exceptions,
        )

    def starmap(
        self,
        function: Callable[..., Any],
        items: Iterable[Iterable[Any]],
        **options: Unpack[MapOptions],
    ) -> Generator[Any, None, None]:
        """`function(*item)` of every item, a sequence of arguments; `map` in all else."""
        return self._map(function, items, starred=True, **options)

    def _map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        retry: RetryRule | int | None = None,
        bundle: int | None = None,
        ordered: bool = True,
        return_exceptions: bool = False,
        starred: bool = False,
    ) -> Generator[Any, None, None]:
        _check_positive(timeout_s=timeout_s, bundle=bundle)
        stage = StageDef(MAP, timeout_s=timeout_s, retry=_rule(retry), bundle=bundle)
        job = self._outgoing.submit(
            job_name(function, name),
            function,
            items,
            stage,
            tolerant=return_exceptions,
            starred=starred,
        )
        results = self._results(job, ordered=ordered, return_exceptions=return_exceptions)
        # Started, or its end would not be noticed if nobody ever asks for a result.
        next(results)
        return results

    def _results(
        self, job: JobDef | None, *, ordered: bool, return_exceptions: bool
    ) -> Generator[Any, None, None]:
        """A method, so that a grid is not closed while a map of its own is under way."""
        if job is None:
            yield None
            return
        link, done = self._link, False
        own = Own.of(job)
        incoming = Incoming(link, job.id, job.items or 0, ordered=ordered)
        try:
            yield None
            for first, encoded in incoming.runs():
                tasks = range(first, first + len(encoded))
                for value in decoded(link, job.id, MAP, tasks, encoded, own):
                    if isinstance(value, TaskFailed) and not return_exceptions:
                        raise value
                    yield value
            done = True
        finally:
            # Perhaps on the garbage collector's behalf, on any thread: nothing may wait here.
            incoming.drop()
            link.leave(job.id, cancel=not done)

    def executor(
        self,
        *,
        name: str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
    ) -> GridExecutor:
        """A `concurrent.futures.Executor` whose calls run on the grid's workers.

        `name` is for its jobs; by default they have their function's. `initializer(*initargs)` is
        called in each worker process before its first call. UsageError where it cannot be pickled.
        """
        from batchlab.client.executor import GridExecutor

        return GridExecutor(
            self,
            self._link,
            self._outgoing,
            name=name,
            initializer=initializer,
            initargs=initargs,
        )

    def run(
        self,
        job: PathText,
        *,
        params: Mapping[str, Any] | None = None,
        out: PathText | None = None,
        timeout_s: float | None = None,
        max_cost_usd: float | None = None,
    ) -> JobResult:
        """Run a job file to its end, whatever that is; with `out`, write its results there.

        `params` replace the file's parameters, `max_cost_usd` its cap: beyond that nothing is
        launched for it any more. After `timeout_s` seconds the job is cancelled, and JobFailed
        raised. JobFileErrors with all that is wrong with the file.
        """
        _check_positive(timeout_s=timeout_s)
        link = self._link
        made = _capped(self._prepared(Path(job), params or {}), max_cost_usd)
        link.follow(made.id)
        ended = False
        try:
            link.call(lambda client: client.submit(made))
            result = self._wait(made.id, timeout_s)
            ended = True
        finally:
            link.leave(made.id, cancel=not ended)
        if out is not None:
            result.fetch(Path(out))
        return result

    def submit(
        self,
        job: PathText | JobDef,
        *,
        params: Mapping[str, Any] | None = None,
        max_cost_usd: float | None = None,
    ) -> str:
        """Submit a job file, or a job made by hand, as `run`, and do not wait; the job's id."""
        made = job if isinstance(job, JobDef) else self._prepared(Path(job), params or {})
        made = _capped(made, max_cost_usd)
        return self._link.call(lambda client: client.submit(made))["id"]

    def _prepared(self, file: Path, params: Mapping[str, Any]) -> JobDef:
        # pydantic and yaml take longer to import than a map takes.
        from batchlab.jobs import submission
        from batchlab.jobs.job_file import load

        link = self._link
        return link.run(
            submission.prepare(
                load(file, {key: _text(value) for key, value in params.items()}),
                objects=link.objects,
                clock=link.clock,
                patience=link.patience,
                token=link.ids.fresh("run"),
                bucket=link.backend.bucket(link.home),
            )
        )

    def wait(self, job: str) -> JobResult:
        """Wait until a job has ended; the job goes on where the wait is interrupted."""
        return self._wait(job, None)

    def _wait(self, job: str, timeout_s: float | None) -> JobResult:
        from batchlab.client.job_result import JobResult

        link = self._link
        now_s = link.clock.monotonic_s
        end_s = now_s() + timeout_s if timeout_s else float("inf")
        view = link.call(lambda client: client.job(job))
        while view["state"] not in ENDED:
            left_s = end_s - now_s()
            if left_s <= 0:
                raise JobFailed(f"Job {job} is cancelled: it took longer than {timeout_s:g} s.")
            view = link.call(_news(view, min(POLL_S, left_s)))
        return JobResult(self, link, view)

    def close(self) -> None:
        """Cancel the jobs whose results somebody still waits for; end the grid if this brought it
        up. Files among the results may be gone afterwards. May be called again."""
        self._end()

    def __repr__(self) -> str:
        return f"<Grid on {self._link.backend.name} in {self._link.home.path}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


def _sized(
    own: Sequence[Pool], workers: int | None, pools: Sequence[Pool], *, warm: bool
) -> Sequence[Pool]:
    """The pools of a grid that is brought up; none where the backend's own will do."""
    _check_positive(workers=workers)
    if workers is not None and pools:
        raise UsageError("Both workers and pools are given.", remedy="Leave one of them out.")
    if workers is not None:
        pools = (Pool("default", 0, workers, 1),)
    if warm:
        pools = tuple(replace(pool, min_size=pool.max_size) for pool in pools or own)
    return pools


def _capped(job: JobDef, max_cost_usd: float | None) -> JobDef:
    _check_positive(max_cost_usd=max_cost_usd)
    return job if max_cost_usd is None else replace(job, max_cost_usd=max_cost_usd)


def _rule(retry: RetryRule | int | None) -> RetryRule:
    if isinstance(retry, RetryRule):
        return retry
    _check_positive(retry=retry)
    return RetryRule(attempts=retry or 1)


def _text(value: Any) -> str:
    """A parameter as it would be written after --set."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UsageError(
        f"A parameter cannot be of type {type(value).__name__}.",
        remedy="Give text, a number, True, False or None.",
    )


def _news(view: JobView, wait_s: float) -> Callable[[Client], JobView]:
    return lambda client: client.job(view["id"], version=view["version"], wait_s=wait_s)


def _check_positive(**arguments: float | None) -> None:
    for name, value in arguments.items():
        if value is not None and value <= 0:
            raise UsageError(f"{name} is {value}.", remedy="Give a number above 0, or None.")
