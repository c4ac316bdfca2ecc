"""Shipped scenarios are replayed for real, compressed, and hold what was forecast of them.

A machine that is busy with something else proves nothing of a forecast, so a replay has two tries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from batchlab.scenarios import record
from tests.support.docker.grid import need_containers
from tests.support.grid.backends import command

MAKESPAN = 0.10
"""How far off a forecast may be, as a share of the fact."""
FLEET = 1
"""And in instances, of the largest fleet."""
TRIES = 3
"""The first forecast is of a machine that does nothing else. Where it does not hold, the machine is
measured by the replay that has just been, as a user would do it."""


def replayed(name: str, backend: str, compress: int, folder: Path, *options: str) -> Mapping[str, Any]:
    """The differences of the whole run by measure, after looking at what must be right anyway."""
    out = folder / "record.json"
    words = [
        sys.executable,
        "-m",
        "batchlab",
        "scenario",
        "replay",
        name,
        "--backend",
        backend,
        "--compress",
        str(compress),
        "--home",
        str(folder / "home"),
        "--out",
        str(out),
        "--json",
        *options,
    ]
    done = subprocess.run(words, env=os.environ, capture_output=True, text=True, check=False, timeout=400)
    # Waits of tens of milliseconds are not what a compressed second is about: red is no failure.
    assert done.returncode in (0, 1), done.stderr[-3000:]
    run = record.read(out)
    assert (run.cut, run.lost, run.duplicates) == ("", 0, 0)
    assert {job.state for job in run.jobs} == {"SUCCEEDED"}
    told = json.loads(done.stdout)["comparison"]["differences"]
    return {one["measure"]: one for one in told if not one["template"]}


@pytest.mark.parametrize(
    ("name", "backend", "compress"),
    [
        ("two-tenants", "local", 100),
        ("ordinary-monday", "local", 1200),
        ("twelve-hour-task", "local", 1500),
        ("two-tenants", "localstack", 60),
    ],
)
def test_the_forecast_of_a_shipped_scenario_holds(
    name: str, backend: str, compress: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend == "localstack":
        need_containers(tmp_path)
    measured: tuple[str, ...] = ()
    seen = []
    for number in range(TRIES):
        folder = tmp_path / str(number)
        told = replayed(name, backend, compress, folder, *measured)
        makespan, fleet = told["makespan"]["relative"], told["peak_fleet"]["absolute"]
        seen.append(f"{makespan:+.1%} off in makespan and {fleet:+g} instances in its largest fleet")
        with capsys.disabled():
            print(f"\n{name} on {backend}, 1/{compress} of its time: the forecast is {seen[-1]}", flush=True)
        if abs(makespan) <= MAKESPAN and abs(fleet) <= FLEET:
            return
        numbers = folder / "calibration.json"
        command("scenario", "calibrate", folder / "record.json", "--out", numbers)
        measured = ("--calibration", str(numbers))
    pytest.fail(f"{name} on {backend} did not hold: {'; '.join(seen)}")
