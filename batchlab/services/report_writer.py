"""Writers of job performance data, with the prices of the home."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.backends import Backend, patience
from batchlab.errors import UsageError
from batchlab.home import Home
from batchlab.model import Pool
from batchlab.ports import Objects

if TYPE_CHECKING:
    from batchlab.report.writing import Writer

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
    from batchlab.costs import prices
    from batchlab.report.building import Setting
    from batchlab.report.writing import Writer

    book = None
    try:
        book = prices.load(home.path)
    except UsageError as error:
        unpriced(error)
    return Writer(
        objects, patience(), Setting(backend.name, tuple(pools), backend.pace, book), scratch
    )
