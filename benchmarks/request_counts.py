"""Number and price of a grid's requests to S3 and SQS, for an idle grid and for a million tasks.

    python benchmarks/request_counts.py [--small] [--json FILE]

The grid runs on `ministack` with two workers, and a proxy counts the grid's requests. Targets: an idle grid sends at
most 6 requests per minute and worker, and uses under 1% of a core. Each tiny task needs at most 0.05 requests, and each
bundle of tasks of 10 ms at most 6 requests. The prices come from `backends/aws/prices.toml`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchlab.core.pricing import price_book
from batchlab.core.pricing.request_costs import Requests, steps, usd_of
from benchmarks.peers import install, services
from tests.support.conform.proxy import Request, Response, Send, proxy

TICKS = os.sysconf("SC_CLK_TCK")


class Meter:
    """Counter of requests by AWS's billing classes."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.bundles = 0
        """Number of committed outcomes. Each bundle has one outcome."""

    def __call__(self, request: Request, send: Send) -> Response:
        if request.action:
            self.counts[f"SQS {request.action}"] += steps(len(request.body))
        elif request.method == "GET" and "list-type" in request.query:
            self.counts["S3 LIST"] += 1
        else:
            kind = {"POST": "PUT", "HEAD": "GET"}.get(request.method, request.method)
            self.counts[f"S3 {kind}"] += 1
            self.bundles += kind == "PUT" and "/outcomes/" in request.path
        return send(request)

    @contextmanager
    def span(self) -> Iterator[Counter[str]]:
        """Yield a counter of the requests during the `with` block. The counter is filled at the end of the block."""
        before, found = self.counts.copy(), Counter[str]()
        yield found
        found.update(self.counts - before)


def usd(counts: Mapping[str, int]) -> float:
    """Return AWS's list price of the counted requests in USD."""
    found = Requests(
        sqs=sum(count for name, count in counts.items() if name.startswith("SQS ")),
        s3_puts=counts.get("S3 PUT", 0) + counts.get("S3 LIST", 0),
        s3_gets=counts.get("S3 GET", 0),
    )
    return sum(usd_of(found, price_book.load()))


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process and its descendants have used so far."""
    parents: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # The process has ended since the folder /proc was listed.
        parents.setdefault(int(fields[1]), []).append(int(entry.name))
        used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICKS

    def total(one: int) -> float:
        return used.get(one, 0.0) + sum(map(total, parents.get(one, ())))

    return total(pid)


def measure(idle_s: float, tasks: int) -> list[dict[str, Any]]:
    """Run all measurements, and return the rows of the table."""
    from batchlab import Grid
    from batchlab.runtime.home import Home

    meter, rows = Meter(), []
    with (
        tempfile.TemporaryDirectory(prefix="batchlab-bench-") as folder,
        services.running({"aws"}, install.DEFAULT) as started,
        proxy(started["aws"].url, meter) as endpoint,
    ):
        os.environ["BATCHLAB_ENDPOINT"] = endpoint
        home = Home(Path(folder) / "grid")
        with Grid("ministack", home=home.path, workers=2, warm=True) as grid:
            list(grid.map(abs, range(20)))
            record = home.record()
            assert record
            # After a job, workers and receivers send more heartbeats and polls for a while, so the measurement starts
            # later.
            time.sleep(idle_s)
            begun_s = cpu_s(record.pid)
            with meter.span() as idle:
                time.sleep(idle_s)
            rows.append(
                {
                    "what": "idle, two workers",
                    "requests": idle.total(),
                    "per_minute_and_worker": idle.total() / 2 / idle_s * 60,
                    "cores": (cpu_s(record.pid) - begun_s) / idle_s,
                    "usd_per_month": usd(idle) / idle_s * 86_400 * 30,
                    "by_kind": dict(idle),
                }
            )
            jobs: list[tuple[str, Callable[[Any], Any], int]] = [
                ("no-op tasks", abs, tasks),
                ("tasks of 10 ms", nap, tasks // 5),
            ]
            for name, function, count in jobs:
                bundles = meter.bundles
                with meter.span() as busy:
                    assert len(list(grid.map(function, range(count)))) == count
                    time.sleep(3.0)  # until the messages of the last events are deleted
                bundles = meter.bundles - bundles
                rows.append(
                    {
                        "what": f"{count:,} {name}, {bundles} bundles",
                        "requests": busy.total(),
                        "requests_per_bundle": busy.total() / bundles,
                        "requests_per_task": busy.total() / count,
                        "usd_per_million_tasks": usd(busy) / count * 1_000_000,
                        "by_kind": dict(busy),
                    }
                )
    return rows


def nap(item: int) -> int:
    """Run a task of 10 ms."""
    time.sleep(0.01)
    return item


def main() -> None:
    """Run the measurements, and print the table of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="a minute instead of five")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(20.0 if options.small else 120.0, 5_000 if options.small else 20_000)
    for row in rows:
        told = {k: v for k, v in row.items() if k not in ("what", "by_kind")}
        print(row["what"])
        print("  " + "  ".join(f"{k}={v:,.4g}" for k, v in told.items()))
        print("  " + "  ".join(f"{k}: {v}" for k, v in sorted(row["by_kind"].items())))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
