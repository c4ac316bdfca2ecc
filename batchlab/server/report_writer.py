"""Writers of job performance data, with the prices that are defined in the grid's home."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.core.errors import UsageError
from batchlab.core.model import Pool
from batchlab.core.ports import Objects
from batchlab.runtime.factory import Backend, patience
from batchlab.runtime.home import Home

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
    from batchlab.core.pricing import price_book
    from batchlab.reports.tables.build import Setting
    from batchlab.reports.tables.write import Writer

    book = None
    try:
        book = price_book.load(home.path)
    except UsageError as error:
        on_error(error)
    return Writer(objects, patience(), Setting(backend.name, tuple(pools), backend.pace, book), scratch)
