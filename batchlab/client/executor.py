"""`concurrent.futures` on the grid. Code for other executors runs unchanged on a GridExecutor.

Invariant: the docstring of GridExecutor lists all differences from a ProcessPoolExecutor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from batchlab.client.dispatch import Dispatch
from batchlab.client.futures import Call, CallFuture
from batchlab.worker.executor_calls import Initializer

if TYPE_CHECKING:
    from batchlab.client.grid_link import Link
    from batchlab.client.submission import JobSubmitter

T = TypeVar("T")


class GridExecutor(Executor):
    """Executor that `Grid.executor` returns. A GridExecutor is thread-safe, and is best used as a context manager.

    As with a ProcessPoolExecutor, the future of a call raises the call's own exception, with the worker's traceback as
    its cause. Done-callbacks run on one thread of this process. Python exits only after all submitted calls are done.
    Differences:

    - cloudpickle pickles functions, arguments, and results, so lambdas and closures work.
    - If a call ends its process (a crash, `os._exit`), only this call fails. A call that ends its process raises
      WorkerDied, which is a BrokenExecutor, but the executor continues. The executor breaks when the grid is closed,
      when its manager is unreachable for some time, or when the initializer raises. After the executor breaks, all open
      and further calls raise BrokenGridExecutor.
    - A future is running as soon as its call is sent, which is soon. The `cancel` method of a running future returns
      False, and the call runs to its end. `shutdown(cancel_futures=True)`, and a `map` whose iterator is closed early,
      also cancel calls that were sent and have not begun.
    - If Ctrl-C ends a `with` block, all calls of the block are canceled, including the running calls.
    - An exception that cannot be unpickled on this machine arrives as TaskFailed with its traceback.
    """

    def __init__(
        self,
        owner: object,
        link: Link,
        outgoing: JobSubmitter,
        *,
        name: str | None,
        initializer: Callable[..., object] | None,
        initargs: Iterable[Any],
    ) -> None:
        """`owner` closes `link` when no reference to `owner` exists."""
        start = None
        if initializer is not None:
            if not callable(initializer):
                raise TypeError("initializer must be a callable")
            pickled = outgoing.shipping.function(partial(initializer, *initargs))
            start = Initializer(link.ids.fresh("executor"), pickled)
        self._link = link
        self._dispatch = Dispatch(owner, link, outgoing, name, start)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An executor cannot be pickled, and neither can a function that uses an executor. A call that sends "
            'calls must create its own Grid(home="...") with the same folder.'
        )

    @cached_property
    def _max_workers(self) -> int:
        """Return the number of calls that can run at once.

        Other libraries read the private attribute `_max_workers` of executors.
        """
        pools = self._link.call(lambda client: client.grid())["pools"]
        return sum(pool["max"] * pool["slots"] for pool in pools if pool["name"] == "default") or 1

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` on a worker.

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

        By default, `map` reads all arguments at once. With `buffersize`, at most `buffersize` calls are ahead of the
        result that the caller reads. `timeout` is the time in seconds, counted from the call of `map`, within which
        each result must arrive. After the timeout, TimeoutError is raised. The grid chooses the size of the bundles if
        `chunksize` is 1. Another value of `chunksize` sets the size of the bundles. If the iterator is closed early or
        raises, the remaining calls are canceled.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        clock = self._link.clock.monotonic_s
        end_s = None if timeout is None else clock() + timeout
        # The iterator refers only to the dispatcher, so an iterator that is not read to its end does not keep the
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
        """Accept no further calls. A repeated call of `shutdown` does nothing.

        If `wait` is True, return only when all calls are done. With `cancel_futures`, cancel the calls that have not
        begun. The cancellation of calls on the grid takes some seconds. Calls that are not canceled run to their end.
        """
        self._dispatch.shutdown(wait=wait, cancel=cancel_futures)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._dispatch.abandon()
        self.shutdown()


def _next(futures: deque[CallFuture], timeout_s: float | None) -> Any:
    """Remove the first future, and return its result.

    `_next` is a separate function, because the frame of the iterator must not refer to the result while the iterator is
    suspended. After a timeout, the future is not removed, so that the iterator cancels the call.
    """
    result = futures[0].result(timeout_s)
    futures.popleft()
    return result
