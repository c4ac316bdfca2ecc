"""GPUs in instance types, scenarios, forecasts, plans, and estimates of costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.cli import scenario_plan
from batchlab.core import instance_types
from batchlab.core.errors import UsageError
from batchlab.core.model import Market, Pool
from batchlab.core.pricing import price_book
from batchlab.core.pricing.estimate import Policy, StageLoad, estimate
from batchlab.core.pricing.estimate import PoolPlan as PricedPool
from batchlab.scenarios import record as records
from batchlab.scenarios.forecast.simulate import simulate
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import PoolPlan, Scenario, StageTemplate
from batchlab.scenarios.planner.candidates import Goal, Instance, current_candidate, instance_choices, trial_result
from batchlab.scenarios.planner.fast_model import FastModel
from batchlab.scenarios.planner.planner import Search
from batchlab.scenarios.planner.search_steps import SizeLimits
from batchlab.scenarios.replay import recording
from tests.support.grid.backends import command as batchlab
from tests.support.scenarios.records import measured
from tests.support.scenarios.small_scenarios import claims

TRAIN = StageTemplate("train", Constant(600.0), gpus=1, bundle=1)

SCENARIO = """\
name: training
about: Trains models.
jobs:
  train:
    tasks: 8
    stages: [{name: train, task: 10m, gpus: 1}]
arrivals:
  - {job: train, at: [0s]}
pools:
  default: {max: 4, slots: 4, instance_type: TYPE}
"""


def test_each_type_with_gpus_has_a_price() -> None:
    book = price_book.load()
    types = [one for one in instance_types.load().types.values() if one.gpus]
    assert {one.name.split(".")[0] for one in types} >= {"g4dn", "g5", "g6", "p4d", "p5"}
    assert all(book.instance_usd_h(one.name).typical > 0 for one in types)
    assert all(book.instance_usd_h(one.name, Market.SPOT).high > 0 for one in types)
    assert instance_types.load().gpus(["g5.12xlarge", "g5.xlarge"]) == 1
    assert instance_types.load().gpus(["g5.xlarge", "m7i.large"]) == 0
    assert instance_types.load().gpus([]) == 0


def test_fast_model_and_forecast_run_one_task_on_each_gpu() -> None:
    """8 tasks of 600 s on two instances with one GPU and four slots each take four rounds."""
    pool = PoolPlan(Pool("default", 2, 2, 4, 0.0, instance_type="g5.xlarge", gpus=1))
    scenario = claims(TRAIN, jobs=1, tasks=8, pool=pool)
    assert measured(FastModel("aws")(scenario, 1), "makespan") == pytest.approx(4 * 600.0)
    assert measured(simulate(scenario), "makespan") == pytest.approx(4 * 600.0, abs=60.0)


def test_autoscaler_of_a_forecast_counts_gpus() -> None:
    pool = PoolPlan(Pool("default", 0, 8, 4, 30.0, instance_type="g5.xlarge", gpus=1))
    scenario = claims(TRAIN, jobs=1, tasks=8, pool=pool)
    for record in (FastModel("aws")(scenario, 1), simulate(scenario)):
        assert measured(record, "peak_fleet") >= 4, "the slots of two instances would be enough for eight tasks"


def _gpu_scenario(kind: str, slots: int, *stages: StageTemplate, tasks: int = 8) -> Scenario:
    """Return a scenario whose tasks run in a pool of the instance type `kind`."""
    gpus = instance_types.load().gpus([kind])
    pool = PoolPlan(Pool("default", 0, 2, slots, 30.0, instance_type=kind, gpus=gpus))
    scenario = claims(*stages, jobs=1, tasks=tasks, pool=pool)
    # Without a Spot wave, all runs of the fast model are equal.
    return replace(scenario, faults=())


def test_a_plan_tries_an_instance_for_each_task_with_a_gpu() -> None:
    scenario, book = _gpu_scenario("g5.xlarge", 4, TRAIN), price_book.load()
    base = trial_result(FastModel("aws")(scenario, 1), book)
    limits = SizeLimits.of(scenario, base, 3600.0, book)
    (fleet,) = current_candidate(scenario).fleets
    assert limits.useful(fleet) == 8
    assert limits.needed(fleet) == 2, "8 tasks of 600 s on one GPU take longer than 3570 s"
    large = replace(fleet, instance=Instance("g5.12xlarge", 48, 4))
    assert limits.useful(large) == 2


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("slots", [1, 6])
def test_a_plan_chooses_only_types_with_enough_gpus(gpus: int, slots: int) -> None:
    catalog, book = instance_types.load().types, price_book.load()
    stages = (TRAIN, replace(TRAIN, name="tune", gpus=gpus, slots=slots))
    for own in (one for one in catalog.values() if one.gpus >= gpus and one.vcpu >= slots):
        scenario = _gpu_scenario(own.name, own.vcpu, *stages)
        ((_, choices),) = instance_choices(scenario, book).items()
        assert choices[0] == Instance(own.name, own.vcpu, own.gpus)
        assert all(one.gpus == catalog[one.type].gpus >= gpus and one.slots >= slots for one in choices)
        assert {one.type.split(".")[0] for one in choices} == {own.name.split(".")[0]}, "other GPUs change the times"
    assert [one.type for one in choices] == ["p5en.48xlarge"], "the family has one type"


def test_a_plan_chooses_only_types_with_enough_memory() -> None:
    scenario = _gpu_scenario("g5.4xlarge", 4, replace(TRAIN, memory_bytes=20 * 2**30))
    ((_, choices),) = instance_choices(scenario, price_book.load()).items()
    types = {one.type for one in choices}
    assert "g5.2xlarge" in types, "32 GiB"
    assert "g5.xlarge" not in types, "16 GiB"


def test_the_lines_of_a_plan_have_the_declared_gpus(tmp_path: Path) -> None:
    path = tmp_path / "training.yaml"
    plain = SCENARIO.replace(", gpus: 1", "")
    for declared, gpus in {"g5.xlarge": 1, "g5.xlarge, gpus: 0": 0, "m7i.large": 0, "m7i.large, gpus: 2": 2}.items():
        path.write_text(plain.replace("TYPE", declared))
        scenario = loader.load(path)
        head, _, _ = plain.partition("pools:")
        path.write_text(head + scenario_plan.as_yaml(scenario) + "\n")
        (plan,) = loader.load(path).pools
        assert plan == scenario.pools[0]
        assert plan.pool.gpus == gpus


def test_a_plan_keeps_the_instance_type_of_other_pools() -> None:
    book = price_book.load()
    assert instance_choices(_gpu_scenario("g5.xlarge", 4, replace(TRAIN, gpus=0)), book) == {}
    scenario = _gpu_scenario("m7i.large", 4, TRAIN)
    (plan,) = scenario.pools
    declared = replace(scenario, pools=(replace(plan, pool=replace(plan.pool, gpus=1)),))
    assert instance_choices(declared, book) == {}, "the type has other GPUs than the pool declares"
    unpriced = replace(book, blocks={**book.blocks, "on_demand": replace(book.blocks["on_demand"], table={})})
    ((_, choices),) = instance_choices(_gpu_scenario("g5.xlarge", 4, TRAIN), unpriced).items()
    assert [one.type for one in choices] == ["g5.xlarge"]


@pytest.mark.parametrize(
    ("own", "slots", "gpus", "best"),
    [
        ("g5.12xlarge", 48, 1, {"g5.xlarge"}),
        ("g5.48xlarge", 192, 2, {"g5.12xlarge"}),
        ("g4dn.16xlarge", 64, 1, {"g4dn.xlarge"}),
        # Four instances with one GPU would run a task at once, but none of them has two GPUs.
        ("g6.24xlarge", 96, 4, {"g6.12xlarge"}),
    ],
)
def test_a_plan_chooses_the_cheapest_type_for_its_gpus(own: str, slots: int, gpus: int, best: set[str]) -> None:
    scenario = _gpu_scenario(own, slots, replace(TRAIN, gpus=gpus), tasks=5)
    model = FastModel("aws")
    search = Search(scenario, Goal(5000.0), model, seeds=2, runs=60, sketch=model)
    search.search()
    answer = search.answer()
    assert answer is not None
    assert answer.holds
    (plan,) = answer.planned.pools
    assert {plan.pool.instance_type} == best
    kind = instance_types.load().of(plan.pool.instance_type)
    assert plan.pool.gpus == kind.gpus >= gpus
    assert plan.pool.slots == kind.vcpu
    tried = [fleet.instance for point in search.real.points() for fleet in point.candidate.fleets]
    assert all(one is not None and one.gpus >= gpus for one in tried)
    shown = scenario_plan.text(answer)
    assert "INSTANCE TYPE" in shown
    assert f"instance_type: {plan.pool.instance_type}" in shown
    assert "takes the same time on each instance type of the family" in shown
    assert "except for pools whose tasks need GPUs" in shown
    (fleet,) = answer.chosen.candidate.fleets
    assert fleet.to_json()["instance_type"] == plan.pool.instance_type


def test_an_estimate_counts_gpus() -> None:
    book, policy = price_book.load(), Policy(drain_target_s=600.0, idle_s=60.0)
    pool = PricedPool("default", "g5.xlarge", slots=4, max_size=10, boot_s=60.0, disk_gb=0.0, gpus=1)
    load = StageLoad("train", (8.0,) * 3, (600.0,) * 3, gpus=1)
    found = estimate([load], [pool], book, policy)
    assert found.instances == {"default": 8}
    assert found.items[0].usd.typical == pytest.approx(8 * 600 / 3600 * 1.006)


def test_a_scenario_takes_the_gpus_of_its_instance_type(tmp_path: Path) -> None:
    path = tmp_path / "training.yaml"
    path.write_text(SCENARIO.replace("TYPE", "g4dn.12xlarge"))
    (plan,) = loader.load(path).pools
    assert plan.pool.gpus == 4
    path.write_text(SCENARIO.replace("TYPE", "m7i.large"))
    with pytest.raises(UsageError, match="takes 1 GPU, and an instance of the pool 'default' has 0"):
        loader.load(path)
    path.write_text(SCENARIO.replace("TYPE", "m7i.large, gpus: 2"))
    (plan,) = loader.load(path).pools
    assert plan.pool.gpus == 2


def test_a_recorded_run_has_its_gpus(tmp_path: Path) -> None:
    path = tmp_path / "training.yaml"
    path.write_text(SCENARIO.replace("TYPE", "m7i.large, gpus: 2"))
    record = records.parse(records.to_json(simulate(loader.load(path))), path)
    written = recording.write(recording.from_record(record, "again"), tmp_path / "again.yaml")
    again = loader.load(written.scenario)
    assert [plan.pool.gpus for plan in again.pools] == [2]
    assert [stage.gpus for stage in again.jobs["train"].stages] == [1]


def test_prices_show_the_cost_of_a_gpu_hour() -> None:
    shown, _ = batchlab("cost", "prices", "g5.12xlarge", "m7i.large")
    assert "ON-DEMAND PER GPU" in shown
    assert "1.4180" in shown, "5.672 USD for 4 GPUs"
    shown, _ = batchlab("cost", "prices", "m7i.large")
    assert "PER GPU" not in shown


def test_an_estimate_refuses_a_type_without_enough_gpus(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: train\ninput: {files: items.jsonl, split: items}\n"
        "stages: [{name: train, command: [ls], resources: {gpus: 1}}]\n"
    )
    (tmp_path / "items.jsonl").write_text("1\n2\n")
    job = ("cost", "estimate", str(tmp_path / "job.yaml"), "--seconds", "60", "--home", str(tmp_path / "home"))
    _, said = batchlab(*job, "--instance-type", "m7i.large", code=2)
    assert "needs 1 GPU, and an instance of type m7i.large has 0" in said
    shown, _ = batchlab(*job, "--instance-type", "g5.xlarge", "--json")
    assert json.loads(shown)["usd"]
