"""Duration of every named query of the reports, over generated performance data of a job with a given number of tasks.

    python benchmarks/reports.py [--tasks N] [--keep DIR] [--json FILE]

Target on two cores: with 10 million tasks, every named query answers in under 2 s from the files alone.
`tests/support/reports/made.py` generates the data, which takes about a minute at full size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batchlab.reports.queries import store
from batchlab.reports.tables.schema import TABLES
from tests.support.reports.made import Made, write_run

TARGET_S = 2.0
TIMES = 3
CORES = 2


def measured(folder: Path) -> dict[str, float]:
    """Return the median seconds of each query, and the seconds for opening the files, which a user also waits for."""
    begun_s = time.perf_counter()
    with store.open_store([folder]) as connection:
        found = {"(opening)": time.perf_counter() - begun_s}
        for name, query in store.named_queries().items():
            took_s = []
            for _ in range(TIMES):
                begun_s = time.perf_counter()
                store.run_query(connection, query.sql)
                took_s.append(time.perf_counter() - begun_s)
            found[name] = statistics.median(took_s)
    return found


def show(tasks: int, size_bytes: int, found: Mapping[str, float]) -> None:
    print(f"{tasks:,} tasks, {size_bytes / 1e6:,.0f} MB of Parquet, {os.cpu_count()} cores")
    for name, seconds in sorted(found.items(), key=lambda one: -one[1]):
        late = "  TOO SLOW" if seconds > TARGET_S else ""
        print(f"  {name:<16} {seconds:6.3f} s{late}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="make the data here, or take what is here")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as made:
        folder = given.keep or Path(made) / "run"
        if not (folder / TABLES[0].file).exists():
            # The generated job has two stages, and each stage has half of the tasks.
            write_run(folder, Made(tasks=given.tasks // 2, per_bundle=500, workers=64))
        size_bytes = sum(one.stat().st_size for one in folder.glob("*.parquet"))
        found = measured(folder)
    show(given.tasks, size_bytes, found)
    if given.json:
        told = {"tasks": given.tasks, "bytes": size_bytes, "seconds": found}
        given.json.write_text(json.dumps(told, indent=2) + "\n")
    return int(max(found.values()) > TARGET_S)


if __name__ == "__main__":
    sys.exit(main())
