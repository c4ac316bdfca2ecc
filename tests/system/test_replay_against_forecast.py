"""Replays of a scenario, compressed, whose results match their forecasts.

A busy machine does not disprove a forecast, so a replay may be repeated.
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
"""The maximum relative error of a forecast."""
FLEET = 1
"""The maximum error in instances, of the largest fleet."""
TRIES = 3
"""The number of tries. The first forecast is for an idle machine. If the forecast does not match, the machine is
calibrated with the last replay, as a user would do."""

LARGE_TENANT = """
name: large-tenant
about: One tenant submits a thousand tasks at once. Small jobs of another tenant have a higher priority.
seed: 31
compress: 30
zones: 2
jobs:
  noisy:
    tasks: 1000
    task: {lognormal: {median: 10s, sigma: 0.4}}
    tenant: noisy
  small:
    tasks: {uniform: {least: 5, most: 20}}
    task: {lognormal: {median: 5s, sigma: 0.4}}
    tenant: quiet
    priority: 10
arrivals:
  - {job: noisy, at: 2m}
  - {job: small, poisson: {per_hour: 40, until: 15m}}
pools:
  default: {min: 2, max: 6, slots: 2, boot: 90s, instance_type: m7i.large, spot: 0.5}
policy: {drain_target: 10m, cooldown_in: 5m, idle: 2m}
expect: {lost: 0, duplicates: 0}
"""
"""A scenario without fair share. With shares, a forecast is less accurate (docs/contributing/forecast-accuracy.md)."""


def replayed(scenario: Path, backend: str, compress: int, folder: Path, *options: str) -> Mapping[str, Any]:
    """Return the differences of the whole run by measure, after the checks that hold on any machine."""
    out = folder / "record.json"
    words = [
        sys.executable,
        "-m",
        "batchlab",
        "scenario",
        "replay",
        str(scenario),
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
    # Waits of tens of milliseconds do not matter in a compressed second, so a red verdict is not a failure.
    assert done.returncode in (0, 1), done.stderr[-3000:]
    run = record.read(out)
    assert (run.cut, run.lost, run.duplicates) == ("", 0, 0)
    assert {job.state for job in run.jobs} == {"SUCCEEDED"}
    told = json.loads(done.stdout)["comparison"]["differences"]
    return {one["measure"]: one for one in told if not one["template"]}


@pytest.mark.parametrize(("backend", "compress"), [("local", 30), ("localstack", 30)])
def test_the_forecast_of_a_scenario_holds(
    backend: str, compress: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = tmp_path / "large-tenant.yaml"
    scenario.write_text(LARGE_TENANT)
    if backend == "localstack":
        need_containers(tmp_path)
    measured: tuple[str, ...] = ()
    seen = []
    for number in range(TRIES):
        folder = tmp_path / str(number)
        told = replayed(scenario, backend, compress, folder, *measured)
        makespan, fleet = told["makespan"]["relative"], told["peak_fleet"]["absolute"]
        seen.append(f"{makespan:+.1%} off in makespan and {fleet:+g} instances in its largest fleet")
        with capsys.disabled():
            print(f"\nOn {backend}, 1/{compress} of its time: the forecast is {seen[-1]}", flush=True)
        if abs(makespan) <= MAKESPAN and abs(fleet) <= FLEET:
            return
        numbers = folder / "calibration.json"
        command("scenario", "calibrate", folder / "record.json", "--out", numbers)
        measured = ("--calibration", str(numbers))
    pytest.fail(f"The forecast on {backend} did not hold: {'; '.join(seen)}")
