"""Writers of job performance data, with the prices of the home."""

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
    """Who writes the performance data of the grid's jobs, in its manager; one at a time in a
    home."""
    scratch = home.scratch / "reports"
    shutil.rmtree(scratch, ignore_errors=True)  # of a manager that was killed while it wrote
    return open_writer(
        backend,
        home,
        objects,
        pools,
        lambda error: log.warning("job performance data has no cost: %s", error),
        scratch,
    )


def open_writer(
    backend: Backend,
    home: Home,
    objects: Objects,
    pools: Sequence[Pool],
    unpriced: Callable[[UsageError], None],
    scratch: Path | None = None,
) -> Writer:
    """Who writes job performance data by the home's prices. Where no price book can be read it
    has no cost, and `unpriced` hears why."""
    from batchlab.core.pricing import price_book
    from batchlab.reports.tables.build import Setting
    from batchlab.reports.tables.write import Writer

    book = None
    try:
        book = price_book.load(home.path)
    except UsageError as error:
        unpriced(error)
    return Writer(
        objects, patience(), Setting(backend.name, tuple(pools), backend.pace, book), scratch
    )
