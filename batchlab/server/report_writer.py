"""Writers of job performance data, with the prices that are defined in the grid's home, and of HTML reports.

Invariant: the manager writes one HTML report at a time, on a thread.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab import __version__
from batchlab.core.errors import UsageError
from batchlab.core.model import JobId, Pool
from batchlab.core.ports import Objects
from batchlab.runtime.factory import Backend, patience
from batchlab.runtime.home import Home
from batchlab.server.answers import acquire

if TYPE_CHECKING:
    from batchlab.reports.tables.write import Writer

log = logging.getLogger(__name__)


def open_reporter(backend: Backend, home: Home, objects: Objects, pools: Sequence[Pool]) -> Writer:
    """Return the writer of performance data for the manager of the grid."""
    scratch = home.scratch / "reports"
    shutil.rmtree(scratch, ignore_errors=True)  # the folder may contain files of a killed manager

    def on_error(error: UsageError) -> None:
        log.warning("job performance data has no cost: %s", error)

    return open_writer(backend, home, objects, pools, on_error, scratch)


def open_html_reports(backend: Backend, home: Home, objects: Objects, pools: Sequence[Pool]) -> HtmlReports:
    """Return the writer of HTML reports for the manager of the grid."""
    scratch = home.scratch / "pages"
    shutil.rmtree(scratch, ignore_errors=True)
    # The reporter of the same manager has logged the error of a price book that cannot be read.
    return HtmlReports(objects, open_writer(backend, home, objects, pools, lambda _: None, scratch), scratch)


def open_writer(
    backend: Backend,
    home: Home,
    objects: Objects,
    pools: Sequence[Pool],
    on_error: Callable[[UsageError], None],
    scratch: Path | None = None,
) -> Writer:
    """Return a writer of job performance data with the prices that are defined in the grid's home.

    If the price book cannot be read, the data does not contain costs, and `on_error` is called with the error.
    """
    from batchlab.reports.tables.build import Setting
    from batchlab.reports.tables.write import Writer
    from batchlab.runtime.aws_deployment import prices_of

    book = None
    try:
        book = prices_of(home)
    except UsageError as error:
        on_error(error)
    return Writer(objects, patience(), Setting(backend.name, tuple(pools), backend.pace, book), scratch)


MAX_CACHED_REPORTS = 4


class HtmlReports:
    """Reports of ended jobs as HTML pages. The last pages are cached by job and round.

    `writer` writes the performance data of a job whose data is not in the bucket. `scratch` is a folder for temporary
    files.
    """

    def __init__(self, objects: Objects, writer: Writer, scratch: Path) -> None:
        self._objects = objects
        self._writer = writer
        self._scratch = scratch
        self._pages: dict[tuple[JobId, int], bytes] = {}
        self._lock = asyncio.Lock()

    async def page(self, job: JobId, round_: int) -> bytes:
        """Return the page that `batchlab report html` writes. Raise BackendError if another report takes too long."""
        if (known := self._pages.get((job, round_))) is not None:
            return known
        remedy = f"Try again later, or run `batchlab report html {job}`."
        await acquire(self._lock, "The manager writes another report.", remedy)
        try:
            if (job, round_) not in self._pages:
                self._pages[job, round_] = await self._write(job)
                while len(self._pages) > MAX_CACHED_REPORTS:
                    del self._pages[next(iter(self._pages))]
            return self._pages[job, round_]
        finally:
            self._lock.release()

    async def _write(self, job: JobId) -> bytes:
        from batchlab.reports.tables.write import fetch, index_of

        def create() -> Path:
            self._scratch.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="page-", dir=self._scratch))

        folder = await asyncio.to_thread(create)
        try:
            index = await index_of(self._objects, patience(), job)
            if index is None:
                await self._writer.make(job, folder)
            else:
                await fetch(self._objects, patience(), job, index, folder)
            return await asyncio.to_thread(self._render, job, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _render(self, job: JobId, folder: Path) -> bytes:
        from batchlab.core.port_retries import patiently
        from batchlab.reports.html import failures, page
        from batchlab.reports.html.source import ReportRun
        from batchlab.reports.queries import store

        with store.open_store([folder]) as connection:
            cases = failures.cases(ReportRun(connection, job))
            # The thread has an event loop of its own, because the figures of the page are computed between the reads.
            samples = asyncio.run(failures.samples(patiently(self._objects, patience()), job, cases))
            return page.render(page.Page(connection, job, samples=samples.get, version=__version__)).encode()
