"""Workloads W1 to W7N: their tasks, and the check of their results."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_GRID = ("W1", "W2", "W3", "W4", "W5")
"""Workloads that run one after another on one warm grid."""

OWN_GRID = ("W6", "W7", "W7N")
"""Workloads that each start a grid."""

ALL = (*SHARED_GRID, *OWN_GRID)
KILLS = ("W7", "W7N")
THROUGHPUT = ("W1", "W2", "W3", "W4")
CALLS = 50
"""Single calls of W5."""


class WrongResults(Exception):
    """A peer returned wrong or incomplete results, or returned results in a wrong order."""


@dataclass(frozen=True)
class Lost:
    """Marker for the result of a task that the peer did not complete."""

    why: str


@dataclass(frozen=True)
class Workload:
    """Calls of one task, with the expected result of each call."""

    name: str
    task: str
    calls: Sequence[tuple[Any, ...]]
    expected: Sequence[Any]
    ideal_s: float | None = None
    """Shortest possible time on two workers, if it is known."""
    timeout_s: float = 240.0
    output: Path | None = None
    """Folder with one JSON file for each task."""
    log: Path | None = None
    """Log of starts and ends of tasks."""

    def check(self, results: Sequence[Any], *, may_lose: bool = False) -> None:
        """Raise WrongResults unless `results` has the expected result of each call, in the order of the calls.

        With `may_lose`, ignore lost tasks.
        """
        if len(results) != len(self.expected):
            raise WrongResults(f"{self.name}: {len(results)} results for {len(self.expected)} tasks.")
        if not may_lose and (lost := [one for one in results if isinstance(one, Lost)]):
            raise WrongResults(f"{self.name}: {len(lost)} tasks are lost, the first one because of {lost[0].why}.")
        for index, (result, expected) in enumerate(zip(results, self.expected, strict=True)):
            if result != expected and not isinstance(result, Lost):
                raise WrongResults(f"{self.name}: the result of task {index} is {result!r} instead of {expected!r}.")
        if self.output:
            written = [json.loads(path.read_text()) for path in sorted(self.output.glob("*.json"))]
            if written != list(self.expected):
                raise WrongResults(f"{self.name}: the files in {self.output.name} differ from the expected results.")


def make_claims(folder: Path, files: int = 400, rows: int = 560, seed: int = 20240601) -> list[list[int]]:
    """Write CSV files of claims with about 50 kB each, unless they exist. Return the rows and cents of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    header = "claim_id,policy_id,lob,state,loss_date,report_date,status,paid,reserve,adjuster"
    sums = []
    for number in range(files):
        source = random.Random(seed + number)
        lines, cents = [header], 0
        for row in range(rows):
            paid = int(source.lognormvariate(7, 1.5) * 100)
            cents += paid
            month, day = source.randrange(1, 13), source.randrange(1, 29)
            columns = [f"C{number:03}{row:06}", f"P{source.randrange(10**8):08}"]
            columns += [source.choice(("AUTO", "HOME", "GL", "WC", "MARINE")), source.choice(("NY", "CA", "TX", "FL"))]
            columns += [f"2023-{month:02}-{day:02}", f"2024-{month:02}-{day:02}"]
            columns += [source.choice(("OPEN", "CLOSED", "REOPENED")), f"{paid // 100}.{paid % 100:02}"]
            columns += [f"{source.randrange(10**6)}.00", f"adj{source.randrange(500):03}"]
            lines.append(",".join(columns))
        path = folder / f"claims_{number:04}.csv"
        if not path.exists():
            path.write_text("\n".join(lines) + "\n")
        sums.append([rows, cents])
    return sums


def make(name: str, work: Path, scale: float = 1.0, slow: float = 1.0) -> Workload:
    """Return the workload `name` with its files in the folder `work`.

    `scale` shrinks all workloads of many tasks. `slow` also shrinks W1, W2, and W4, for peers that need minutes.
    """

    def count(full: int, factor: float = 1.0) -> int:
        return max(4, int(full * scale * factor))

    match name:
        case "W1" | "W5" | "W6":
            n = {"W1": count(10_000, slow), "W5": CALLS, "W6": 10}[name]
            return Workload(name, "noop", [(i,) for i in range(n)], [i * i for i in range(n)])
        case "W2" | "W3":
            task, ms, n = ("busy", 5, count(2_000, slow)) if name == "W2" else ("nap", 100, count(200))
            return Workload(name, task, [(i, ms) for i in range(n)], range(n), ideal_s=n * ms / 2000)
        case "W4":
            n, output = count(400, slow), work / "output"
            output.mkdir(exist_ok=True)
            for path in output.iterdir():
                path.unlink()
            source = work / "claims"
            sums = make_claims(source, n)
            calls = [(i, str(source / f"claims_{i:04}.csv"), str(output)) for i in range(n)]
            return Workload(name, "transform", calls, sums, output=output)
        case "W7" | "W7N":
            n, ms, log = count(500), 20, work / "tasks.log"
            log.unlink(missing_ok=True)
            calls_of_nap = [(i, ms, str(log)) for i in range(n)]
            ideal_s = n * ms / 2000
            return Workload(name, "logged_nap", calls_of_nap, range(n), ideal_s=ideal_s, timeout_s=150.0, log=log)
    raise ValueError(f"No such workload: {name}")
