"""Comparison of forecasts with replays of batchlab's scenarios on a real grid, in compressed time.

The replays run one after another.

Target: the forecast makespan is within 10% of the measured makespan, and the forecast largest fleet is within one
instance of the measured fleet. The forecasts do not use a calibration. Other work on this machine disturbs a replay.
The table therefore shows how busy the machine was before each replay. A row of a busy machine proves nothing.

    python benchmarks/fact.py [SCENARIO ...] [--backend NAME] [--compress K] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlab.runtime import factory

COMPRESS: Mapping[str, float] = {
    "two-tenants": 100,
    "long-tail": 60,
    "twelve-hour-task": 1500,
    "slow-drain": 360,
    "spot-wave": 180,
    "nightly-transform": 60,
    "flash-burst": 20,
    "zone-loss": 60,
    "ordinary-monday": 600,
    "media-backlog": 120,
    "poison-batch": 30,
    "claims-month-end": 120,
}
"""Time compression by scenario.

A replay of the last scenario takes five minutes. A replay of any other scenario takes less than three minutes, and most
replays take one minute.
"""
MAKESPAN, FLEET = 0.10, 1.0
LOOK_S = 5.0
BUSY = 0.10
"""Share of the machine's cores in use before a replay from which the machine counts as busy with other work."""
LONGEST_S = 900.0


@dataclass(frozen=True, slots=True)
class Row:
    """Result of one scenario.

    `told` contains the differences between forecast and replay for the whole run, by measure. `busy` is the share of
    the machine's cores that other processes used before the replay.
    """

    name: str
    compress: float
    busy: float
    took_s: float
    told: Mapping[str, Mapping[str, Any]]

    @property
    def cells(self) -> tuple[str, ...]:
        span, fleet = self.told["makespan"], self.told["peak_fleet"]
        holds = abs(span["relative"]) <= MAKESPAN and abs(fleet["absolute"]) <= FLEET
        return (
            f"`{self.name}`",
            f"1/{self.compress:g}",
            f"{span['forecast']:.1f} s",
            f"{span['fact']:.1f} s",
            f"{span['relative']:+.1%}".replace("-", "−"),
            f"{fleet['forecast']:g}, {fleet['fact']:g}",
            "yes" if holds else "NO",
            f"{self.busy:.0%}{' BUSY' if self.busy > BUSY else ''}",
            f"{self.took_s:.0f} s",
        )


HEADS = (
    "scenario",
    "of its time",
    "makespan, forecast",
    "fact",
    "error",
    "largest fleet",
    "holds",
    "machine before",
    "took",
)


def busy_share() -> float:
    """Return the share of this machine's cores that is in use now, measured for `LOOK_S` seconds (Linux)."""

    def ticks() -> tuple[int, int]:
        fields = [int(one) for one in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    before = ticks()
    time.sleep(LOOK_S)
    after = ticks()
    return 1 - (after[1] - before[1]) / max(1, after[0] - before[0])


def measured(name: str, backend: str, compress: float, folder: Path) -> Row:
    """Replay the scenario, and return the result.

    Raise SystemExit if the replay fails, or if tasks are lost or duplicated.
    """
    busy = busy_share()
    out = folder / f"{name}.json"
    command = [
        sys.executable,
        "-m",
        "batchlab",
        "scenario",
        "replay",
        name,
        "--json",
        "--backend",
        backend,
        "--compress",
        str(compress),
        "--out",
        str(out),
    ]
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [*command, "--home", home], env=os.environ, capture_output=True, text=True, check=False, timeout=LONGEST_S
        )
    # A replay with a red verdict is accepted, because compressed time cannot resolve waits of milliseconds.
    if done.returncode not in (0, 1):
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    said = json.loads(done.stdout)
    lost = [row for row in said["verdict"] if row["measure"] in ("lost", "duplicates")]
    if said["cut"] or any(row["measured"] for row in lost):
        raise SystemExit(f"{name}: {said['cut'] or lost}")
    if said["comparison"] is None:
        raise SystemExit(f"{name}: the replay has no forecast. {done.stderr[-2000:]}")
    whole = [one for one in said["comparison"]["differences"] if not one["template"]]
    told = {one["measure"]: one for one in whole}
    if told["makespan"]["relative"] is None or told["peak_fleet"]["absolute"] is None:
        raise SystemExit(f"{name}: a job did not end, or the fleet was not sampled.")
    return Row(name, compress, busy, time.monotonic() - begun_s, told)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("scenario", nargs="*", help=f"of {', '.join(COMPRESS)}; without any, all")
    asked.add_argument("--backend", default="local")
    asked.add_argument("--compress", type=float, help="in place of each one's own")
    asked.add_argument("--keep", type=Path, help="where the records go")
    given = asked.parse_args()
    names = given.scenario or list(COMPRESS)
    if unknown := [one for one in names if one not in COMPRESS]:
        asked.error(f"there is no scenario {unknown[0]!r}: there are {', '.join(COMPRESS)}")
    cores = factory.load("local").usual.cores
    print(f"On {given.backend}, on a machine of {cores} cores.\n", flush=True)
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}", flush=True)
    missed = 0
    with tempfile.TemporaryDirectory() as aside:
        folder = given.keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            row = measured(name, given.backend, given.compress or COMPRESS[name], folder)
            missed += "NO" in row.cells
            print(f"| {' | '.join(row.cells)} |", flush=True)
    print(f"\n{len(names) - missed} of {len(names)} hold.")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
