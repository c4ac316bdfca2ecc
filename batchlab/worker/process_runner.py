"""Runner of tasks in warm child processes, which may crash, hang, or leak without harm to the worker.

Invariant: at most `slots` runs are active, each with its own child process. A task cannot raise an exception in the
worker, and the processes of a task do not outlive its run.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Sequence

from batchlab.core.model import Ran
from batchlab.core.ports import Clock, LocalFiles, Objects
from batchlab.core.service_settings import VALUE_CACHE_BYTES
from batchlab.worker.child_process import TICK_S, Children, Sampler, monotonic_s
from batchlab.worker.code_cache import CodeCache
from batchlab.worker.execution import Execution, ExecutionContext, Folders
from batchlab.worker.inflight_message import Handle, Scratch, Work

log = logging.getLogger(__name__)

CLEAN_AFTER_S = 0.02
"""Delay in seconds before the folder of an ended execution is removed."""


class ProcessRunner:
    """Runner of every backend except the simulator."""

    def __init__(
        self,
        objects: Objects,
        scratch: Scratch,
        clock: Clock,
        slots: int,
        files: LocalFiles | None = None,
        *,
        value_cache_bytes: int = VALUE_CACHE_BYTES,
        gpu_names: Sequence[str] = (),
    ) -> None:
        """Create a runner. `gpu_names` has the name of each GPU of the instance, as CUDA_VISIBLE_DEVICES lists them."""
        # Child processes have other current folders than the worker, so paths must be absolute.
        scratch = Scratch(scratch.root.absolute())
        self._scratch = scratch
        self._slots = asyncio.Semaphore(slots)
        self._cleaning: set[asyncio.Task[None]] = set()
        children = Children(scratch.root / "children", slots)
        code_cache = CodeCache(objects, scratch, asyncio.to_thread, value_cache_bytes)
        sampler = Sampler(monotonic_s, TICK_S / 2)
        folders = Folders(scratch.root / "spare", slots)
        self._context = ExecutionContext(
            objects, files, clock, children, code_cache, sampler, folders, tuple(gpu_names)
        )

    def prepare(self) -> None:
        """Start a child process for each slot before the first bundle arrives.

        Remove the folders that a killed worker on the same instance has left.
        """
        self._remove_folders()
        try:
            self._context.children.start_spares()
        except OSError as error:  # The first bundle starts a child again, and reports a failure.
            log.info("the child processes did not start: %s", error)

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See `inflight_message.Runner`."""
        async with self._slots:
            execution = Execution(work, handle, self._scratch.execution(work.execution), self._context)
            driver = asyncio.create_task(execution.run())
            try:
                while (entry := await execution.results.get()) is not None:
                    if isinstance(entry, list):
                        for ran in entry:
                            yield ran
                        continue
                    await asyncio.wait({entry})
                    if not entry.cancelled():  # A kill cancels uploads that are in progress.
                        yield entry.result()
                await driver
            finally:
                driver.cancel()
                await asyncio.gather(driver, return_exceptions=True)
                await execution.cancel_uploads()
                cleaning = asyncio.create_task(_clean(execution))
                self._cleaning.add(cleaning)
                cleaning.add_done_callback(self._cleaning.discard)

    async def close(self) -> None:
        """Kill every child process, and remove the folders of children and executions.

        The unpacked code stays on the disk, because it saves a download at the next start.
        """
        await self._context.children.close()
        await asyncio.gather(*self._cleaning, return_exceptions=True)
        await asyncio.to_thread(self._remove_folders)

    def _remove_folders(self) -> None:
        for name in ("children", "run", "functions", "values", "spare"):
            shutil.rmtree(self._scratch.root / name, ignore_errors=True)


async def _clean(execution: Execution) -> None:
    # The delay lets the worker commit the results before the folder is removed.
    await asyncio.sleep(CLEAN_AFTER_S)
    await execution.clean()
