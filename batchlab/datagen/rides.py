"""Taxi rides as CSV, for turning text into typed, partitioned columns, with the truth about them.

Same columns as the public New York samples: a file of those works in its place.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from batchlab.datagen.seeds import source


@dataclass(slots=True)
class MonthFacts:
    """What was written for one month of pickup."""

    rides: int = 0
    total_cents: int = 0
    without_payment: int = 0
    """Rides whose kind of payment is empty."""


@dataclass(slots=True)
class RidesFacts:
    """What `write_rides` wrote; `months` by month of pickup ("2024-01")."""

    path: Path
    months: dict[str, MonthFacts] = field(default_factory=dict)


_COLUMNS = (
    "pickup", "dropoff", "passengers", "distance", "fare", "tip", "tolls", "total", "color",
    "payment", "pickup_zone", "dropoff_zone", "pickup_borough", "dropoff_borough",
)  # fmt: skip
_ZONES = (
    ("Astoria", "Queens"), ("Bushwick South", "Brooklyn"), ("East Harlem North", "Manhattan"),
    ("JFK Airport", "Queens"), ("Mott Haven/Port Morris", "Bronx"), ("Midtown East", "Manhattan"),
    ("Upper West Side South", "Manhattan"), ("", ""),
)  # fmt: skip


def write_rides(folder: Path, *, seed: int = 1, rows: int = 20_000) -> RidesFacts:
    """Write `rides.csv` into `folder`: `rows` rides of the first quarter of 2024, in no order."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = source(seed, "rides")
    facts = RidesFacts(folder / "rides.csv")
    with facts.path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for _ in range(rows):
            pickup = datetime(2024, 1, 1) + timedelta(seconds=rng.randrange(91 * 86_400))  # noqa: DTZ001  local time, as meters print it
            distance = rng.randrange(30, 2_000)
            fare = 250 + 50 * (distance // 20)
            tip = rng.randrange(0, fare // 3)
            tolls = 576 if rng.random() < 0.05 else 0
            total = fare + tip + tolls + 80
            start, end = rng.choice(_ZONES), rng.choice(_ZONES)
            payment = rng.choices(("credit card", "cash", ""), weights=(70, 29, 1))[0]
            writer.writerow((
                pickup, pickup + timedelta(seconds=distance * 3), rng.randint(0, 6),
                *(f"{number // 100}.{number % 100:02d}" for number in
                  (distance, fare, tip, tolls, total)),
                rng.choice(("yellow", "green")), payment, start[0], end[0], start[1], end[1],
            ))  # fmt: skip
            month = facts.months.setdefault(f"{pickup:%Y-%m}", MonthFacts())
            month.rides += 1
            month.total_cents += total
            month.without_payment += not payment
    return facts
