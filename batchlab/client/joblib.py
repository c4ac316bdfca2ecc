"""Backend for joblib that runs the calls of `joblib.Parallel` on a grid, also for scikit-learn's parameter `n_jobs`.

The import of this module registers the backend "batchlab" in joblib:

    import batchlab.client.joblib

    with joblib.parallel_config("batchlab", grid=grid):
        GridSearchCV(estimator, parameters).fit(x, y)

Invariant: each call of Parallel has an executor of its own, so an aborted call of Parallel does not affect other calls.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from batchlab.client.executor import GridExecutor
from batchlab.client.grid import Grid
from batchlab.core.errors import UsageError
from batchlab.worker.executor_calls import Timed

try:
    from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, register_parallel_backend
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "joblib":
        raise
    raise ModuleNotFoundError(
        "batchlab.client.joblib needs joblib, which is not installed: pip install joblib installs it.", name="joblib"
    ) from None

NAME = "batchlab"

if TYPE_CHECKING:  # The declarations replace joblib's missing type annotations.

    class _Base:
        def __init__(self, *, nesting_level: int | None) -> None: ...
        def reset_batch_stats(self) -> None: ...
        def batch_completed(self, batch_size: int, duration: float) -> None: ...
else:

    class _Base(AutoBatchingMixin, ParallelBackendBase):
        """Base classes from joblib, which put more calls into a batch until the run of a batch takes 0.2 s."""


class GridBackend(_Base):
    """Implementation of joblib's interface for backends, with an executor of the grid."""

    default_n_jobs = -1
    supports_retrieve_callback = True

    def __init__(self, grid: Grid | None = None, nesting_level: int | None = None) -> None:
        super().__init__(nesting_level=nesting_level)
        if grid is None:
            raise UsageError(
                "The joblib backend needs a grid.", remedy='Use joblib.parallel_config("batchlab", grid=grid).'
            )
        self._grid = grid
        self._executor: GridExecutor | None = None
        self._run_s = 0.0
        self.parallel: Any = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of calls that run in parallel. As in joblib, a negative `n_jobs` counts down from the
        maximum.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is not None and n_jobs > 0:
            return n_jobs
        return max(1, self._current_executor()._max_workers + 1 + (n_jobs or -1))

    def _current_executor(self) -> GridExecutor:
        self._executor = self._executor or self._grid.executor(name="joblib")
        return self._executor

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        self.parallel = parallel
        return self.effective_n_jobs(n_jobs)

    def submit(self, func: Callable[[], Any], callback: Callable[[Future[Any]], Any] | None = None) -> Future[Any]:
        future: Future[Any] = self._current_executor().submit(Timed(func))
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        result, self._run_s = out.result()
        return result

    def batch_completed(self, batch_size: int, duration: float) -> None:  # noqa: ARG002 - joblib's signature
        """Report to joblib how long the batch of the last retrieved result ran on its worker.

        joblib chooses the batch size by the reported time. The argument `duration` includes the transfer of the batch,
        so with `duration` joblib would never batch very short calls.
        """
        super().batch_completed(batch_size, self._run_s)

    def abort_everything(self, ensure_ready: bool = True) -> None:  # noqa: ARG002 - joblib's signature
        """Cancel the remaining calls of the executor. The next call of `submit` creates another executor."""
        self._close(cancel=True)

    def terminate(self) -> None:
        self._close(cancel=False)
        self.reset_batch_stats()

    def _close(self, *, cancel: bool) -> None:
        if self._executor:
            self._executor.shutdown(wait=False, cancel_futures=cancel)
            self._executor = None


register_parallel_backend(NAME, GridBackend)
