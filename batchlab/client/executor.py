"""`concurrent.futures` on the grid: code written for any of its executors runs here unchanged.

Invariant: what differs from a ProcessPoolExecutor is said in the docstring of GridExecutor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import cached_property, partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from batchlab.client.dispatch import Dispatch
from batchlab.client.futures import Call, CallFuture
from batchlab.worker.executor_calls import Initializer

if TYPE_CHECKING:
    from batchlab.client.grid_link import Link
    from batchlab.client.submission import Outgoing

T = TypeVar("T")


class GridExecutor(Executor):
    """Made by `Grid.executor`. Usable from several threads; best as a context manager.

    As with a ProcessPoolExecutor, a call's own exception is raised by its future, with the
    worker's traceback as its cause; done-callbacks run on one thread of this process; what was
    submitted is done before Python ends. Differences:

    - Functions, arguments and results are pickled by cloudpickle: lambdas and closures will do.
    - A call that ends its process (a crash, `os._exit`) fails alone, with WorkerDied, which is a
      BrokenExecutor; the executor goes on. It is broken (BrokenGridExecutor for every call that is
      not done and every further one) when the grid is closed, when its manager cannot be reached
      for some time, or when the initializer raises.
    - A future is running from when it is sent, which is soon. Its `cancel` then returns False, and
      the call runs to its end. `shutdown(cancel_futures=True)` and a `map` whose iterator is closed
      early also cancel calls that were sent and have not begun.
    - A `with` block that is left by Ctrl-C cancels all of its calls, those that run too.
    - An exception that cannot be unpickled here arrives as TaskFailed with its traceback.
    """

    def __init__(
        self,
        owner: object,
        link: Link,
        outgoing: Outgoing,
        *,
        name: str | None,
        initializer: Callable[..., object] | None,
        initargs: Iterable[Any],
    ) -> None:
        """`owner` closes `link` once nothing refers to it any more."""
        made = None
        if initializer is not None:
            if not callable(initializer):
                raise TypeError("initializer must be a callable")
            pickled = outgoing.shipping.function(partial(initializer, *initargs))
            made = Initializer(link.ids.fresh("executor"), pickled)
        self._link = link
        self._dispatch = Dispatch(owner, link, outgoing, name, made)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An executor cannot be pickled, nor a function that uses it. A call that makes calls "
            'of its own needs a grid of its own: with Grid(home="...") in it, the same folder.'
        )

    @cached_property
    def _max_workers(self) -> int:
        """How many calls may run at once. Private as in `concurrent.futures`, where others read it
        all the same."""
        pools = self._link.call(lambda client: client.grid())["pools"]
        return sum(pool["max"] * pool["slots"] for pool in pools if pool["name"] == "default") or 1

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` on a worker. RuntimeError after `shutdown`, its subclass
        BrokenGridExecutor where no call can be made any more."""
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
        """As `map(fn, *iterables)`, run on the workers. All arguments are drawn at once, unless
        `buffersize` says how many calls may be ahead of the result that is read.

        `timeout` counts seconds from now until each result must be there; TimeoutError. Calls
        travel in bundles anyhow, so a `chunksize` of 1 leaves their sizes to the grid; another one
        fixes them. An iterator that is closed early, or raises, cancels the calls that are left.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        clock = self._link.clock.monotonic_s
        end_s = None if timeout is None else clock() + timeout
        # Not we ourselves: an iterator that nobody reads to its end keeps no executor alive.
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
        """Take no further calls. May be called again.

        With `wait` returns when all calls are done. With `cancel_futures` those that have not
        begun are cancelled, on the grid too, which takes some seconds; the others run to their end.
        """
        self._dispatch.shutdown(wait=wait, cancel=cancel_futures)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._dispatch.abandon()
        self.shutdown()


def _next(futures: deque[CallFuture], timeout_s: float | None) -> Any:
    """The first one's result, which no frame of the iterator may hold while it waits for its
    reader. One that is not there in time stays among those to cancel."""
    result = futures[0].result(timeout_s)
    futures.popleft()
    return result
