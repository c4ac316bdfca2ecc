"""Executor of `concurrent.futures` that runs calls on a grid. Code for other executors runs unchanged on a
GridExecutor.

Invariant: the docstring of GridExecutor lists all differences from a ProcessPoolExecutor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from batchlab.client import thread_cache
from batchlab.client.dispatch import Dispatch
from batchlab.client.futures import Call, CallFuture, Packer, Sender
from batchlab.client.job_watch import import_http
from batchlab.core.api_types import pool_of
from batchlab.manager.admission import admit_to_pool

if TYPE_CHECKING:
    from batchlab.client.grid_link import Link
    from batchlab.client.submission import JobSubmitter
    from batchlab.core.job_definition import StageDef

T = TypeVar("T")


class GridExecutor(Executor):
    """Executor that `Grid.executor` returns. A GridExecutor is thread-safe, and is best used as a context manager.

    As with a ProcessPoolExecutor, the future of a call raises the call's own exception, with the worker's traceback as
    its cause. Done-callbacks run on one thread of this process. Python exits only after all submitted calls are done. A
    GridExecutor differs from a ProcessPoolExecutor as follows:

    - cloudpickle pickles functions, arguments, and results, so lambdas and closures work.
    - If a call ends its process (a crash, `os._exit`), only the future of this call raises an error. The error is
      WorkerDied, a subclass of BrokenExecutor, but the executor continues. The executor breaks when the grid is closed,
      when its manager is unreachable for some time, or when the initializer raises. After the executor breaks, all open
      and further calls raise BrokenGridExecutor.
    - A future is running as soon as its call is sent to the grid. The `cancel` method of a running future returns
      False, and the call runs to its end. `shutdown(cancel_futures=True)`, and a `map` whose iterator is closed early,
      also cancel calls that were sent and have not begun, except the calls of a job with a call whose `cancel` has
      returned False.
    - If Ctrl-C ends a `with` block, all calls of the block are canceled, including the running calls.
    - If the exception of a call cannot be unpickled on this machine, the future raises TaskFailed with the exception's
      traceback.
    """

    def __init__(
        self,
        owner: object,
        link: Link,
        outgoing: JobSubmitter,
        *,
        name: str | None,
        stage: StageDef,
        initializer: Callable[..., object] | None,
        initargs: Iterable[Any],
        show_output: bool,
    ) -> None:
        """When the last reference to `owner` is dropped, `owner` closes `link`. `stage` has the pool and the slots of
        the calls.
        """
        start = None
        if initializer is not None:
            if not callable(initializer):
                raise TypeError("initializer must be a callable")
            start = outgoing.pickler.function(partial(initializer, *initargs))
        pools = {view["name"]: pool_of(view) for view in link.call(lambda client: client.grid())["pools"]}
        gpus = {name: pool.gpus for name, pool in pools.items()}
        admit_to_pool(stage, {name: pool.slots for name, pool in pools.items()}, gpus)
        pool = pools[stage.pool]
        parallel = pool.slots // stage.slots
        if stage.gpus:
            parallel = min(parallel, pool.gpus // stage.gpus)
        self._max_workers = pool.max_size * parallel or 1
        """Number of calls that can run at once. Other libraries read this private attribute of executors."""
        self._link = link
        packer = Packer(outgoing.pickler, start, link.ids.fresh("executor"))
        sender = Sender(link, outgoing, packer, name, stage)
        self._dispatch = Dispatch(owner, link, sender, show_output=show_output)
        with suppress(RuntimeError):  # Without a thread, the first watch imports the client.
            thread_cache.run(import_http)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An executor cannot be pickled, and neither can a function that uses an executor. A call that sends "
            'calls must create its own Grid(home="...") with the same folder.'
        )

    @property
    def _broken(self) -> bool:
        """Return whether the executor can no longer run calls. ProcessPoolExecutor has the same private attribute."""
        return self._dispatch.is_broken

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` on a worker of the grid, and return the future of the call.

        Raise RuntimeError after `shutdown`. Raise BrokenGridExecutor, a subclass of RuntimeError, if the executor can
        no longer run calls.
        """
        future = CallFuture()
        self._dispatch.submit(Call(future, fn, args, kwargs))
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Return the results of `map(fn, *iterables)`, computed by the workers.

        By default, `map` reads all arguments at once. With `buffersize`, `map` submits at most `buffersize` calls whose
        results the caller has not read. `timeout` is the time in seconds, counted from the call of `map`, within which
        each result must arrive. After `timeout` seconds, the iterator raises TimeoutError. If `chunksize` is 1, the
        grid chooses the number of calls in a bundle. Any other `chunksize` sets the number of calls in a bundle. If the
        iterator is closed early or raises an error, the remaining calls are canceled.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        clock = self._link.clock.monotonic_s
        end_s = None if timeout is None else clock() + timeout
        # The iterator refers to the dispatcher instead of the executor, so an unfinished iterator does not keep the
        # executor alive.
        dispatch = self._dispatch
        drawn = (Call(CallFuture(), fn, args, {}) for args in zip(*iterables, strict=False))
        calls = list(islice(drawn, buffersize))
        futures = deque(call.future for call in calls)
        dispatch.submit_all(calls, bundle=chunksize if chunksize > 1 else None)

        def results() -> Iterator[T]:
            try:
                while futures:
                    if buffersize and (call := next(drawn, None)):
                        futures.append(call.future)
                        dispatch.submit(call)
                    yield _next(futures, None if end_s is None else end_s - clock())
            finally:
                for future in futures:
                    future.disown()

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse all further calls. A repeated call of `shutdown` does nothing.

        If `wait` is True, return only when all calls are done. If `cancel_futures` is True, cancel the calls that have
        not begun. The cancellation of calls on the grid takes some seconds. Calls that have begun run to their end.
        """
        self._dispatch.shutdown(wait=wait, cancel=cancel_futures)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._dispatch.abandon()
        self.shutdown()


def _next(futures: deque[CallFuture], timeout_s: float | None) -> Any:
    """Remove the first future from `futures`, and return the result of the future.

    `_next` is a separate function, because a suspended iterator must not keep a reference to a result. After a timeout,
    the future stays in `futures`, so that the iterator cancels the future's call.
    """
    result = futures[0].result(timeout_s)
    futures.popleft()
    return result
