"""Python API of batchlab. The class Grid starts a grid, maps functions over items, and runs job files.

Invariant: a job of `map` or `run` is canceled if its caller stops waiting, because of an error or Ctrl-C, or by leaving
a loop early.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack

from batchlab.core.errors import JobFailed, TaskFailed, UsageError
from batchlab.core.model import ENDED, Pool
from batchlab.core.retry_rule import RetryRule
from batchlab.runtime import factory, manager_process
from batchlab.runtime.home import find_home
from batchlab.runtime.manager_process import ManagerStart

if TYPE_CHECKING:
    from batchlab.client.executor import GridExecutor
    from batchlab.client.http import Client
    from batchlab.client.results import JobResult
    from batchlab.core.job_definition import JobDef
    from batchlab.core.shared_values import Shared

__all__ = ["Grid"]

PathText = str | os.PathLike[str]
T = TypeVar("T")


class _MapOptions(TypedDict):
    """Options of the methods `map` and `starmap` of a Grid. The docstring of `map` describes the options."""

    name: str | None
    timeout_s: float | None
    retry: RetryRule | int | None
    bundle: int | None
    pool: str
    slots: int
    gpus: int
    side_effects: bool
    ordered: bool
    return_exceptions: bool
    progress: bool
    show_output: bool


class Grid:
    """Grid in a folder.

    If a grid is not up in the folder, the Grid object starts a grid. Grid objects of one process share the started
    grid, and the last `close` stops it. A Grid object is thread-safe, and is best used as a context manager. A Grid
    object that is left open is closed when the last reference to the object is dropped, or when Python exits.
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
        """`home` is the grid's folder. The default of `home` is BATCHLAB_HOME, or `.batchlab` in the current folder.

        With `workers`, the default pool has from 0 to `workers` instances with one slot each. `pools` sets all pools of
        the grid. By default, the grid has the default pools of its backend. `warm` keeps the pools at their maximum
        size. If a grid is already up in the folder, the Grid object joins this grid. Raise UsageError if `workers`,
        `pools`, or `warm` differs from the pools of this grid.
        """
        descriptor, folder = factory.load(backend), find_home(Path(home) if home else None)
        sized = _size_pools(descriptor.pools, workers, pools, warm=warm)
        descriptor.find_place(folder)  # Raise UsageError if the folder belongs to another endpoint.
        begun = manager_process.begin_manager(folder, descriptor, pools=sized, parent=True)
        start = begun if isinstance(begun, ManagerStart) else None
        try:
            # While the manager starts, this process imports the modules that the first call of `map` needs.
            import batchlab.client.results  # noqa: F401
            from batchlab.client.grid_link import Link
            from batchlab.client.submission import JobSubmitter, ObjectPickler

            pickler = ObjectPickler()
            if start:
                pickler.check_modules()
            self._link = Link(descriptor, folder, sized, start)
        except BaseException:
            if start:
                start.cancel()  # Nothing else would stop the manager before the end of this process.
            raise
        # Unlike the method `__del__`, a callback of `weakref.finalize` also runs when Python exits.
        self._end = weakref.finalize(self, self._link.close)
        self._outgoing = JobSubmitter(self._link, pickler)

    @property
    def client(self) -> Client:
        """Return the client of the manager's HTTP API. The manager knows all calls whose results this process has."""
        client = self._link.client  # A forked child must not report, because it shares the connections of its parent.
        self._link.report()
        return client

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        retry: RetryRule | int | None = None,
        bundle: int | None = None,
        pool: str = "default",
        slots: int = 1,
        gpus: int = 0,
        side_effects: bool = False,
        ordered: bool = True,
        return_exceptions: bool = False,
        progress: bool = False,
        show_output: bool = False,
    ) -> Generator[Any, None, None]:
        """Return the results of `function(item)`, or `function(item, ctx)`, for every item, computed by the grid's
        workers.

        `map` reads and submits all items before `map` returns. The results have the order of the items, or with
        `ordered=False` the order in which the tasks end. If `function` is a coroutine function, the task runs the
        coroutine to its end. If a task fails, the iterator raises TaskFailed at the position of the task's result, and
        the remaining tasks are canceled. The TaskFailed is also an instance of the type that the task raised, and its
        `__cause__` is the task's exception. With `return_exceptions`, the TaskFailed is returned as the result of the
        task, and the other tasks continue. If the iterator is dropped or closed, the remaining tasks are canceled.

        `timeout_s` is the time limit of each task. `retry` is a RetryRule or the maximum number of attempts of a task.
        By default, a task that raises an exception is not retried. The loss of a worker does not count as a failure of
        a task. `bundle` sets the number of tasks in a bundle. The tasks run in the pool `pool`, and each task occupies
        `slots` slots and `gpus` GPUs of an instance. A task that runs far longer than the other tasks may get a second,
        speculative copy on another worker, unless `side_effects` is true or the tasks use GPUs. `progress` counts the
        ended tasks on the standard error. `show_output` prints the output of each ended task. Raise UsageError and
        submit nothing if the function or an item cannot be pickled.
        """
        return self._map(
            function,
            items,
            starred=False,
            name=name,
            timeout_s=timeout_s,
            retry=retry,
            bundle=bundle,
            pool=pool,
            slots=slots,
            gpus=gpus,
            side_effects=side_effects,
            ordered=ordered,
            return_exceptions=return_exceptions,
            progress=progress,
            show_output=show_output,
        )

    def starmap(
        self,
        function: Callable[..., Any],
        items: Iterable[Iterable[Any]],
        *,
        name: str | None = None,
        timeout_s: float | None = None,
        retry: RetryRule | int | None = None,
        bundle: int | None = None,
        pool: str = "default",
        slots: int = 1,
        gpus: int = 0,
        side_effects: bool = False,
        ordered: bool = True,
        return_exceptions: bool = False,
        progress: bool = False,
        show_output: bool = False,
    ) -> Generator[Any, None, None]:
        """Return the results of `function(*item)` for every item. Each item is a sequence of arguments.

        The options are the options of `map`.
        """
        return self._map(
            function,
            items,
            starred=True,
            name=name,
            timeout_s=timeout_s,
            retry=retry,
            bundle=bundle,
            pool=pool,
            slots=slots,
            gpus=gpus,
            side_effects=side_effects,
            ordered=ordered,
            return_exceptions=return_exceptions,
            progress=progress,
            show_output=show_output,
        )

    def _map(
        self, function: Callable[..., Any], items: Iterable[Any], *, starred: bool, **options: Unpack[_MapOptions]
    ) -> Generator[Any, None, None]:
        from batchlab.client.submission import MAP, job_name
        from batchlab.core.job_definition import StageDef

        timeout_s, bundle, slots, gpus = options["timeout_s"], options["bundle"], options["slots"], options["gpus"]
        _check_positive(timeout_s=timeout_s, bundle=bundle, slots=slots)
        _check_gpus(gpus)
        stage = StageDef(
            MAP,
            timeout_s=timeout_s,
            retry=_rule(options["retry"]),
            slots=slots,
            gpus=gpus,
            bundle=bundle,
            pool=options["pool"],
            side_effects=options["side_effects"],
            speculative_copies=True,
        )
        name, tolerant = job_name(function, options["name"]), options["return_exceptions"]
        job = self._outgoing.submit(name, function, items, stage, tolerant=tolerant, starred=starred)
        results = self._results(job, options)
        # Start the generator, so that its `finally` block runs even if the caller does not read a result.
        next(results)
        return results

    def _results(self, job: JobDef | None, options: _MapOptions) -> Generator[Any, None, None]:
        """Yield the results of a map.

        The generator keeps a reference to the Grid object, so that the grid is not closed while the caller reads
        results.
        """
        from batchlab.client.results import MapResults, decode_all
        from batchlab.client.submission import MAP
        from batchlab.client.task_output import Progress, show
        from batchlab.core.protocol.bundle_inputs import JobObjects

        if job is None:
            yield None
            return
        link, done = self._link, False
        own = JobObjects.of_job(job)
        count = job.items or 0
        progress = Progress(job.name, count) if options["progress"] else None
        incoming = MapResults(
            link,
            job.id,
            count,
            ordered=options["ordered"],
            on_poll=progress.update if progress else None,
            on_outcome=partial(show, link, progress=progress) if options["show_output"] else None,
        )
        try:
            yield None
            for first, encoded in incoming.runs():
                tasks = range(first, first + len(encoded))
                for value in decode_all(link, job.id, MAP, tasks, encoded, own):
                    if isinstance(value, TaskFailed) and not options["return_exceptions"]:
                        raise value
                    yield value
            done = True
        finally:
            # The garbage collector may run the `finally` block on any thread, so the `finally` block must not wait.
            incoming.cancel()
            link.leave(job.id, cancel=not done)
            if progress:
                progress.close()

    def put(self, value: T) -> Shared[T]:
        """Store a large value once for all tasks of the grid, and return a reference to it.

        Pass the reference to tasks as an argument, or use it in a mapped function. Tasks read the value as
        `reference.value`. Each process of a worker loads the value once, and must not change it. Raise UsageError if
        the value cannot be pickled.
        """
        return self._outgoing.put(value)

    def executor(
        self,
        *,
        name: str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        pool: str = "default",
        slots: int = 1,
        gpus: int = 0,
        show_output: bool = False,
    ) -> GridExecutor:
        """Return a `concurrent.futures.Executor` whose calls run on the grid's workers.

        `name` is the name of the executor's jobs. By default, a job has the name of the function that its first call
        calls. Each worker process calls `initializer(*initargs)` before its first call. The calls run in the pool
        `pool`, and each call occupies `slots` slots and `gpus` GPUs of an instance. `show_output` prints the output of
        each call that has ended. Raise UsageError if the initializer cannot be pickled.
        """
        from batchlab.client.executor import GridExecutor
        from batchlab.client.submission import MAP
        from batchlab.core.job_definition import StageDef

        _check_positive(slots=slots)
        _check_gpus(gpus)
        self._link.direct_calls.open()
        return GridExecutor(
            self,
            self._link,
            self._outgoing,
            name=name,
            stage=StageDef(MAP, retry=RetryRule(attempts=1), slots=slots, gpus=gpus, pool=pool),
            initializer=initializer,
            initargs=initargs,
            show_output=show_output,
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
        """Run a job file to its end, and return the job's result whether the job succeeds or fails.

        If `out` is given, the job's results are written to the folder `out`. `params` replaces parameters of the job
        file, and `max_cost_usd` replaces the cost cap of the job file. When the job reaches the cost cap, the manager
        launches no more instances for the job. After `timeout_s` seconds, the job is canceled, and `run` raises
        JobFailed. For an invalid job file, `run` raises JobFileErrors with all mistakes in the file.
        """
        _check_positive(timeout_s=timeout_s)
        link = self._link
        job_def = _cap(self._prepare(Path(job), params or {}), max_cost_usd)
        link.follow(job_def.id)
        ended = False
        try:
            link.call(lambda client: client.submit(job_def))
            result = self._wait(job_def.id, timeout_s)
            ended = True
        finally:
            link.leave(job_def.id, cancel=not ended)
        if out is not None:
            result.fetch(Path(out))
        return result

    def submit(
        self,
        job: PathText | JobDef,
        *,
        params: Mapping[str, Any] | None = None,
        max_cost_usd: float | None = None,
        after: Iterable[str] = (),
    ) -> str:
        """Submit a job file or a JobDef without waiting for the end of the job, and return the job's id.

        `after` has the ids of jobs that must succeed before the job begins. A job in the form `ID:ended` must only end.
        If a job that must succeed ends without success, the submitted job is FAILED.
        """
        from batchlab.core.job_definition import Dependency, JobDef

        dependencies = tuple(map(Dependency.parse, [after] if isinstance(after, str) else after))
        job_def = job if isinstance(job, JobDef) else self._prepare(Path(job), params or {})
        job_def = _cap(job_def, max_cost_usd)
        if dependencies:
            job_def = replace(job_def, after=dependencies)
        return self._link.call(lambda client: client.submit(job_def))["id"]

    def _prepare(self, file: Path, params: Mapping[str, Any]) -> JobDef:
        # The import is inside the method, because the import of pydantic and yaml takes longer than a short call of
        # `map`.
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
        """Wait until a job has ended. If the wait for a job is interrupted, the job continues."""
        return self._wait(job, None)

    def _wait(self, job: str, timeout_s: float | None) -> JobResult:
        from batchlab.client.grid_link import POLL_S
        from batchlab.client.http import Client
        from batchlab.client.results import JobResult

        link = self._link
        now_s = link.clock.monotonic_s
        end_s = now_s() + timeout_s if timeout_s else float("inf")
        view = link.call(lambda client: client.job(job))
        while view["state"] not in ENDED:
            left_s = end_s - now_s()
            if left_s <= 0:
                raise JobFailed(f"Job {job} is canceled because it took longer than {timeout_s:g} s.")
            poll = partial(Client.job, job=job, version=view["version"], wait_s=min(POLL_S, left_s))
            view = link.call(poll)
        return JobResult(self, link, view)

    def close(self) -> None:
        """Cancel the jobs for which a caller waits. Stop the grid if this process started it, and if no other Grid
        object of this process uses it.

        `close` deletes fetched result files that are not in a folder of the caller. A repeated call of `close` does
        nothing.
        """
        self._end()

    def __repr__(self) -> str:
        return f"<Grid on {self._link.backend.name} in {self._link.home.path}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _size_pools(own: Sequence[Pool], workers: int | None, pools: Sequence[Pool], *, warm: bool) -> Sequence[Pool]:
    """Return the pools of a new grid, or an empty sequence if the grid gets the default pools of its backend."""
    _check_positive(workers=workers)
    if workers is not None and pools:
        raise UsageError("Both workers and pools are set.", remedy="Set only one of them.")
    if workers is not None:
        pools = (Pool("default", 0, workers, 1),)
    if warm:
        pools = tuple(replace(pool, min_size=pool.max_size) for pool in pools or own)
    return pools


def _cap(job: JobDef, max_cost_usd: float | None) -> JobDef:
    _check_positive(max_cost_usd=max_cost_usd)
    return job if max_cost_usd is None else replace(job, max_cost_usd=max_cost_usd)


def _rule(retry: RetryRule | int | None) -> RetryRule:
    if isinstance(retry, RetryRule):
        return retry
    _check_positive(retry=retry)
    return RetryRule(attempts=retry or 1)


def _text(value: Any) -> str:
    """Return the value of a job parameter as the text that the option --set would have."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    raise UsageError(
        f"A parameter cannot be of type {type(value).__name__}.", remedy="Use text, a number, True, False, or None."
    )


def _check_gpus(gpus: int) -> None:
    from batchlab.core.job_definition import MAX_GPUS

    if type(gpus) is not int or not 0 <= gpus <= MAX_GPUS:
        raise UsageError(f"gpus is {gpus!r}.", remedy=f"Give a whole number from 0 to {MAX_GPUS}.")


def _check_positive(**arguments: float | None) -> None:
    for name, value in arguments.items():
        if value is not None and value <= 0:
            raise UsageError(f"{name} is {value}.", remedy="Use a number above 0, or None.")
