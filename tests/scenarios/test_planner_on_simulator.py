"""The planner and the calibration on the simulator, and their commands from the file to the exit code."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from batchlab.cli import scenario_plan
from batchlab.core.pricing import price_book
from batchlab.runtime import factory
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios import record
from batchlab.scenarios.forecast import calibration as calibrate
from batchlab.scenarios.forecast.comparison import Comparison, compare
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.values import Scenario
from batchlab.scenarios.planner.candidates import (
    Candidate,
    Goal,
    PoolConfig,
    TrialResult,
    apply_candidate,
    trial_result,
)
from batchlab.scenarios.planner.fast_model import FastModel
from batchlab.scenarios.planner.planner import Search
from batchlab.scenarios.record import Record
from tests.support.cli import Run, run
from tests.support.scenarios.plan_models import BOOK

__all__ = ["run"]

CLAIMS = """
name: claims
about: Five small jobs, one every five minutes.
seed: 7
jobs:
  claims:
    tasks: 8
    stages:
      - {name: parse, task: {lognormal: {median: 8s, sigma: 0.5}}, bundle: 2}
      - {name: sum, gather: all, task: 5s}
arrivals:
  - {job: claims, at: [0s, 5m, 10m, 15m, 20m]}
pools:
  default: {min: 1, max: 4, slots: 2, boot: 20s, instance_type: m7i.large}
policy: {drain_target: 20s, cooldown_in: 1m, idle: 1m}
"""
TRUTH = replace(
    factory.load("local").usual,
    boot_s={"default": 45.0},
    bundle_s=1.5,
    submit_s=6.0,
    end_s=4.0,
    stretch={"claims/parse": 1.4, "claims/sum": 0.8},
)
PLAIN = """
name: plain
about: 32 tasks of a minute on instances of two slots.
seed: 3
jobs:
  sums: {tasks: 32, task: 60s}
arrivals:
  - {job: sums, at: [0s]}
pools:
  default: {min: 0, max: 2, slots: 2, boot: 30s, instance_type: m7i.large}
policy: {drain_target: 5m}
"""


def a_scenario(text: str) -> Scenario:
    return loader.parse(text, Path("a.yaml"))


def simulated(seed: int, calibration: Calibration | None) -> Record:
    like = factory.load("local")
    return simulate(a_scenario(CLAIMS), seed=seed, like=like, calibration=calibration)


# --- Calibration ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> list[Record]:
    return [simulated(seed, TRUTH) for seed in (1, 2)]


def test_known_parameters_are_recovered_from_simulated_runs(facts: list[Record]) -> None:
    made = calibrate.calibrate(facts).calibration
    # Boot times vary between instances. The other values are exact up to the time of calls.
    assert made.boot_s["default"] == pytest.approx(45.0, rel=0.15)
    assert made.bundle_s == pytest.approx(1.5, abs=0.01)
    assert made.submit_s == pytest.approx(6.0, abs=0.05)
    assert made.end_s == pytest.approx(4.0, abs=0.05)
    assert made.stretch == {"claims/parse": pytest.approx(1.4, rel=1e-6), "claims/sum": pytest.approx(0.8, rel=1e-6)}


@pytest.mark.slow
def test_a_calibrated_forecast_is_closer_to_the_fact(facts: list[Record]) -> None:
    """The comparison uses the mean of many runs. In one run, a different boot time may move work between instances, and
    the p95 of five jobs depends on one job."""
    made = calibrate.calibrate(facts).calibration
    plain, better = [], []
    for seed in range(9, 13):
        fact = simulated(seed, TRUTH)
        plain.append(compare(simulated(seed, None), fact))
        better.append(compare(simulated(seed, made), fact))

    def error(of: list[Comparison], name: str) -> float:
        found = [one.of(name).relative for one in of]
        return statistics.fmean(abs(one) for one in found if one is not None)

    for name in ("makespan", "p95_wait", "p95_turnaround"):
        assert error(plain, name) > 0.02
        assert error(better, name) < 0.4 * error(plain, name)
    for curve in range(len(plain[0].curves)):
        before, after = (statistics.fmean(one.curves[curve].mean_error for one in of) for of in (plain, better))
        assert after < 0.4 * before


def test_runs_are_calibrated_and_compared_from_files(facts: list[Record], run: Run, tmp_path: Path) -> None:
    files = []
    for fact in facts:
        files.append(tmp_path / f"{fact.seed}.json")
        record.write(fact, files[-1])
    out = tmp_path / "local.json"
    code, told, said = run("scenario", "calibrate", *files, "--out", out)
    assert code == 0
    assert "stretch  claims/parse  × 1.400" in told
    assert "80 tasks" in told
    assert f"The calibration is in {out}" in said
    assert calibrate.read(out) == calibrate.calibrate(facts).calibration
    code, told, _ = run("scenario", "calibrate", *files, "--json")
    assert (code, json.loads(told)["runs"]) == (0, 2)
    record.write(simulated(1, calibrate.read(out)), tmp_path / "forecast.json")
    code, told, _ = run("scenario", "compare", tmp_path / "forecast.json", files[0])
    assert code == 0
    assert "makespan" in told
    assert "instances in service (● A, ░ B)" in told
    code, told, _ = run("scenario", "compare", tmp_path / "forecast.json", files[0], "--json")
    assert code == 0
    makespan = next(d for d in json.loads(told)["differences"] if d["measure"] == "makespan")
    assert abs(makespan["relative"]) < 0.01
    record.write(replace(facts[1], scenario="other"), files[1])
    for call in (("compare", files[0], files[1]), ("compare", files[0], tmp_path / "none.json"), ("calibrate", out)):
        code, _, said = run("scenario", *call)
        assert (code, said.count("Traceback")) == (2, 0)
        assert said.startswith("Error: ")


# --- Planning ------------------------------------------------------------------------------------


def test_planner_matches_arithmetic_on_the_simulated_grid() -> None:
    """In 5 min, an existing instance runs 4 or 5 rounds of 2 tasks of a minute, so 4 instances run all 32 tasks and 3
    do not. A changing fleet or Spot can only be cheaper."""
    scenario = a_scenario(PLAIN)
    forecast = partial(scenario_plan.forecast, backend="aws", calibration=None)

    def of_size(size: int) -> TrialResult:
        fleet = Candidate((PoolConfig("default", size, size),), 60.0)
        return trial_result(forecast(apply_candidate(scenario, fleet), 3), BOOK, 300.0)

    assert of_size(3).finish_s == pytest.approx(360.0, abs=10.0)
    enough = of_size(4)
    assert enough.finish_s == pytest.approx(240.0, abs=10.0)
    assert enough.usd < of_size(5).usd
    sketch = FastModel("aws")
    search = Search(scenario, Goal(300.0), forecast, seeds=2, runs=60, sketch=sketch)
    search.search()
    plan = search.answer()
    assert plan is not None
    assert plan.holds
    assert plan.chosen.finish_s <= 300.0
    assert plan.chosen.peak >= 4
    assert plan.chosen.usd <= enough.usd


def test_a_plan_from_file_to_exit_code(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(PLAIN)
    few = ("--seeds", 1, "--runs", 6, "--jobs", 1)
    code, told, _ = run("scenario", "plan", file, "--deadline", "20m", *few, "--json")
    found = json.loads(told)
    assert (code, found["holds"], found["in_time"]["met"]) == (0, True, 1)
    # The suggested text is a valid scenario with the recommended plan.
    kept = PLAIN[: PLAIN.index("pools:")]
    pasted = a_scenario(f"{kept}{found['yaml']}")
    (fleet,) = found["recommended"]["pools"].values()
    (pool,) = (one.pool for one in pasted.pools)
    assert (pool.min_size, pool.max_size) == (fleet["min"], fleet["max"])
    assert pasted.policy.drain_target_s == found["recommended"]["drain_target_s"]
    code, told, _ = run("scenario", "plan", file, "--deadline", "70s", *few)
    assert code == 1
    assert "No fleet meets the deadline of 70.0 s." in told
    code, told, _ = run("scenario", "plan", file, "--deadline", "20m", "--budget", "0.001 USD", *few)
    assert code == 1
    assert "No fleet was found that is in time for 0.001 USD" in told


def test_forecast_and_plan_use_the_grids_prices(run: Run, tmp_path: Path) -> None:
    """Before, both used the shipped prices, while the bill, the estimate, and the replay used the home's prices."""
    file, home = tmp_path / "plain.yaml", tmp_path / "home"
    file.write_text(PLAIN)
    home.mkdir()
    dear = price_book.write(BOOK).replace('"m7i.large" = 0.1008', '"m7i.large" = 1.008')
    (home / price_book.NAME).write_text(dear)
    few = ("--deadline", "20m", "--seeds", 1, "--runs", 6, "--jobs", 1, "--json")
    forecasts, plans = [], []
    for where in (tmp_path / "none", home):
        out = tmp_path / "record.json"
        assert run("scenario", "simulate", file, "--home", where, "--out", out)[0] == 0
        forecasts.append(record.read(out).usd or 0.0)
        code, told, _ = run("scenario", "plan", file, "--home", where, *few)
        assert code == 0
        plans.append(json.loads(told)["usd_mean"])
    for before, after in (forecasts, plans):
        assert after > 5 * before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--deadline", "soon"), "not a duration"),
        (("--deadline", "0s"), "cannot be met"),
        (("--deadline", "1h", "--runs", "20"), "none is left for the search"),
        (("--deadline", "1h", "--budget", "5 EUR"), "not an amount in USD"),
        (("--deadline", "1h", "--like", "moon"), "moon"),
        (("--deadline", "1h", "--calibration", "none.json"), "cannot be read"),
    ],
)
def test_contradictory_options_are_refused(options: tuple[str, ...], why: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text(PLAIN)
    code, _, said = run("scenario", "plan", file, *options)
    assert code == 2
    assert why in said
    assert "Traceback" not in said
