"""How a grid's account is kept: the price book in its folder, put to what its manager counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from batchlab.costs import prices
from batchlab.costs.meter import Accounting, Kind
from batchlab.costs.money import HOURS_A_MONTH, WORKER_DISK_GB
from batchlab.costs.requests import usd_of
from batchlab.errors import UsageError
from batchlab.home import Home
from batchlab.model import Pool
from batchlab.tally import Tally

log = logging.getLogger(__name__)


def accounting_of(home: Home, pools: Sequence[Pool], tally: Tally) -> Accounting:
    """How the account is kept; without prices where no price book can be read."""
    try:
        book = prices.load(home.path)
    except UsageError as error:
        log.warning("nothing has a price, so no cost can be capped: %s", error)
        return Accounting(tally=tally)
    own = {pool.name: pool.instance_type for pool in pools}
    disk_usd_h = book.of("ebs", "gp3_usd_per_gb_month") * WORKER_DISK_GB / HOURS_A_MONTH

    def usd_h(kind: Kind) -> float:
        return book.rate(kind.type, kind.market, own.get(kind.pool, "")).high + disk_usd_h

    return Accounting(usd_h, lambda requests: sum(usd_of(requests, book)), tally)
