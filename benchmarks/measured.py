"""Shared code of the benchmarks, which runs each part of a benchmark in its own process and prints the figures."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Part = Callable[..., "list[Row]"]


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure.

    `target` is the figure's required minimum, or the required maximum with `at_most`. A figure without a requirement
    has the target None.
    """

    what: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        met = self.value <= self.target if self.at_most else self.value >= self.target
        sign = "≤" if self.at_most else "≥"
        return f"{sign} {self.target:,.6g}: {'met' if met else 'MISSED'}"


def peak_mb() -> float:
    """Return the largest memory of this process so far (RSS) in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rss_mb() -> float:
    """Return the current memory of this process (RSS) in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(doc: str | None, parts: Mapping[str, Part], choose: Callable[[bool], Sequence[tuple[str, list[Any]]]]) -> None:
    """Run the main program of a benchmark, and print the figures as a table.

    Each (part, arguments) of `choose(is_small)` runs in its own process, so that the memory of each part is measured
    separately.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="less of everything, for a check")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--only", metavar="PART", choices=parts, help=", ".join(parts))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, arguments = options.one
        told = [asdict(row) for row in parts[name](*json.loads(arguments))]
        print(json.dumps(told))
        return
    rows: list[Row] = []
    for name, arguments in choose(options.small):
        if options.only in (None, name):
            found = _in_child(name, arguments)
            for row in found:
                print(f"{row.what:<62} {row.value:>12,.6g} {row.unit:<8} {row.verdict}", flush=True)
            rows += found
    if options.json:
        told = [{**asdict(row), "verdict": row.verdict} for row in rows]
        options.json.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")


def _in_child(name: str, arguments: list[Any]) -> list[Row]:
    command = [sys.executable, sys.argv[0], "--one", name, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]
