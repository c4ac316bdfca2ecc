"""Fair share in a scenario: scenario file, forecast, comparison, replay of the policy, and recording."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchlab.core.errors import Refused
from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId
from batchlab.manager.fair_share import FairShare
from batchlab.scenarios.forecast import comparison, simulated_work
from batchlab.scenarios.forecast.simulate import ForecastOptions, simulate
from batchlab.scenarios.model import loader
from batchlab.scenarios.model.expansion import compress_scenario, expand
from batchlab.scenarios.model.values import Job, Scenario
from batchlab.scenarios.record import Record, parse, to_json
from batchlab.scenarios.replay import driver, recording
from batchlab.scenarios.replay.measurements import Measurements, StageTotals
from batchlab.scenarios.replay.run_state import ManagerConnection, RunState
from batchlab.sim.world import World
from tests.scenarios.test_replay_run import Line, Manager
from tests.sim.mutants.kit import Plant
from tests.support.cli import Run, a_job, runner
from tests.support.scenarios.files import load, refused
from tests.support.scenarios.records import measured
from tests.support.sim.scenes import A, job, stage

TEXT = """\
name: teams
about: Two teams. It teaches.
jobs:
  bulk: {tasks: 20, task: 5s, share: bulk}
  small: {tasks: 4, task: 2s, share: team1}
arrivals:
  - {job: bulk, at: {at: 0s, count: 12}}
  - {job: small, at: [30s, 1m, 90s, 2m]}
pools:
  default: {min: 2, max: 2, slots: 2, instance_type: m7i.large}
shares:
  decay: 5m
  reservation: 0
  shares:
    - {identifier: bulk, weight: 2}
    - {identifier: "team*"}
expect: {lost: 0}
"""
POLICY = SharePolicy((ShareAttributes("bulk", 2.0), ShareAttributes("team*")), decay_s=300.0)
LIMITED = TEXT.replace("weight: 2}", "weight: 2, max_slots: 1}")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command line."""
    return runner(monkeypatch, capsys)


def turnaround_s(record: Record) -> float:
    return measured(record, "p95_turnaround", "small")


# --- The scenario file ---------------------------------------------------------------------------


def test_a_scenario_has_a_policy_and_its_jobs_have_shares(tmp_path: Path) -> None:
    scenario = load(tmp_path, TEXT)
    assert scenario.shares == POLICY
    assert {name: template.share for name, template in scenario.jobs.items()} == {"bulk": "bulk", "small": "team1"}
    compressed = compress_scenario(scenario, 60).shares
    assert compressed == replace(POLICY, decay_s=5.0)
    assert load(tmp_path, re.sub(r"(?s)shares:\n.*expect", "shares: {}\nexpect", TEXT)).shares == SharePolicy()
    assert load(tmp_path, re.sub(r"(?s)shares:\n.*expect", "expect", TEXT)).shares is None


def test_the_share_of_a_job_file_is_the_share_of_its_template(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: sums\nshare: payers\ninput: {files: a.txt}\nstages: [{name: add, command: [cat]}]\n"
    )
    text = TEXT.replace("small: {tasks: 4, task: 2s, share: team1}", "small: {file: job.yaml, task: 2s}")
    assert load(tmp_path, text).jobs["small"].share == "payers"
    other = text.replace("file: job.yaml", "file: job.yaml, share: team2")
    assert load(tmp_path, other).jobs["small"].share == "team2"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("share: team1", "share: team 1", 5, "'share' cannot be 'team 1': it must be letters and digits."),
        ('"team*"', "te*am", 16, "it must be letters and digits, which an asterisk may follow"),
        ('identifier: "team*"', "weight: 2", 16, "'identifier' is missing."),
        ('"team*"', '"b*"', 16, "The entries 'bulk' and 'b*' apply to the same share. Delete one of the two."),
        ('"team*"', "bulk", 16, "The entries 'bulk' and 'bulk' apply to the same share."),
        ("weight: 2", "weight: 0", 15, "'weight' must be at least 0.0001, not 0."),
        ("weight: 2", "max_slots: 0", 15, "'max_slots' must be at least 1, not 0."),
        ("weight: 2", "weigth: 2", 15, "Did you mean 'weight'?"),
        ("decay: 5m", "decay: 8d", 12, "A share decay is at most 7 days. Write 7d or less."),
        ("decay: 5m", "decay: 0s", 12, "leaves no time"),
        ("reservation: 0", "reservation: 100", 13, "'reservation' must be at most 99, not 100."),
    ],
)
def test_mistakes_in_shares(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    (error,) = refused(tmp_path, TEXT.replace(old, new))
    assert error.line == line
    assert words in f"{error.message} {error.remedy}"


@pytest.mark.parametrize(
    ("old", "new", "doubt"),
    [
        ("share: team1", "share: other", "No job that arrives belongs to the share 'team*'."),
        (
            TEXT[TEXT.index("shares:") : TEXT.index("expect")],
            "",
            "The jobs have shares (bulk, team1), and the scenario has no fair-share policy.",
        ),
    ],
)
def test_a_check_questions_shares_without_an_effect(run: Run, tmp_path: Path, old: str, new: str, doubt: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(TEXT.replace(old, new))
    code, _, err = run("scenario", "check", file)
    assert code == 0
    assert doubt in err
    file.write_text(TEXT)
    _, out, err = run("scenario", "check", file)
    assert "is fine" in out


# --- The forecast --------------------------------------------------------------------------------


def check_effect(scenario: Scenario) -> None:
    """Check that a forecast follows the policy: small jobs hardly wait, and a limited share uses only its slots."""
    record, free = simulate(scenario), simulate(replace(scenario, shares=None))
    assert [run.id for run in record.jobs] == [run.id for run in free.jobs]
    assert (record.shares, free.shares) == (scenario.shares, None)
    assert {run.share for run in record.jobs} == {"bulk", "team1"}
    assert turnaround_s(record) < 0.5 * turnaround_s(free)
    assert (record.lost, record.duplicates, record.cut) == (0, 0, "")


def check_limit(scenario: Scenario) -> None:
    record = simulate(scenario)
    assert measured(record, "makespan", "bulk") >= 12 * 20 * 5.0, "the share used more than one slot"
    assert (record.lost, record.cut) == (0, "")


def test_a_forecast_follows_the_policy(tmp_path: Path) -> None:
    check_effect(load(tmp_path, TEXT))
    check_limit(load(tmp_path, LIMITED))


def no_policy(plant: Plant) -> None:
    """The simulated manager does not get the policy."""

    @plant.method(FairShare, "change")
    async def change(self: FairShare, change: Callable[[SharePolicy], SharePolicy] | None) -> None:
        pass


def no_share(plant: Plant) -> None:
    """The jobs of the forecast lose their shares."""
    original = simulated_work.job_def

    @plant.everywhere(simulated_work.job_def)
    def job_def(job: Job, submitted_s: float) -> JobDef:
        return replace(original(job, submitted_s), share="")


@pytest.mark.parametrize("bug", [no_policy, no_share])
def test_a_forecast_that_ignores_shares_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Callable[[Plant], None]
) -> None:
    scenario, limited = load(tmp_path, TEXT), load(tmp_path, LIMITED)
    bug(Plant(monkeypatch))
    with pytest.raises(AssertionError):
        check_effect(scenario)
    with pytest.raises(AssertionError, match="more than one slot"):
        check_limit(limited)


CRASHED = LIMITED.replace("expect:", "faults: [{at: 1m, fault: manager-crash, for: 10s}]\nexpect:")


def test_the_next_manager_of_a_forecast_follows_the_policy(tmp_path: Path) -> None:
    check_limit(load(tmp_path, CRASHED))


def test_a_next_manager_that_ignores_the_policy_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @Plant(monkeypatch).method(FairShare, "load")
    async def load_(self: FairShare) -> None:
        pass

    with pytest.raises(AssertionError, match="more than one slot"):
        check_limit(load(tmp_path, CRASHED))


def test_a_forecast_divides_the_window_as_the_reference_computation(tmp_path: Path) -> None:
    cuts: list[int] = []

    async def examine(world: World, _jobs: object) -> None:
        cuts.append(world.watch.shares.cuts)

    simulate(load(tmp_path, TEXT), options=ForecastOptions(watched=True, examine=examine))
    assert cuts[0] > 20


def test_no_shares_forecasts_without_the_policy(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(TEXT)
    for option, name in (((), "with"), (("--no-shares",), "without")):
        code, _, err = run("scenario", "simulate", file, *option, "--out", tmp_path / f"{name}.json")
        assert code == 0, err
    records = [parse((tmp_path / f"{name}.json").read_bytes(), tmp_path) for name in ("with", "without")]
    assert [record.shares for record in records] == [POLICY, None]
    assert turnaround_s(records[0]) < 0.5 * turnaround_s(records[1])
    assert "their fair-share policies differ" in comparison.compare(*records).notes
    code, out, _ = run("scenario", "compare", tmp_path / "with.json", tmp_path / "without.json")
    assert code == 0
    assert "Note: their fair-share policies differ." in out


def test_a_plan_has_the_policy_or_ignores_it(run: Run, tmp_path: Path) -> None:
    """With one slot, the share needs five minutes on any fleet."""
    file = tmp_path / "s.yaml"
    file.write_text(LIMITED.replace("count: 12", "count: 3"))
    words = ("scenario", "plan", file, "--deadline", "4m", "--runs", "6", "--seeds", "1", "--jobs", "1")
    code, out, _ = run(*words)
    assert code == 1
    assert "Assumed: shares are as in the scenario" in out
    code, out, err = run(*words, "--no-shares")
    assert code == 0, (out, err)
    assert "Assumed: shares" not in out


# --- Replay and recording ------------------------------------------------------------------------


class SharedManager(Manager):
    """A manager with a fair-share policy, which stores the changes of the policy."""

    def __init__(self, policy: dict[str, Any] | None) -> None:
        super().__init__()
        self.policy = policy
        self.is_read_only = False

    def shares(self) -> Any:
        return {"policy": self.policy, "shares": [], "problem": ""}

    def remove_share(self, identifier: str | None) -> Any:
        if self.is_read_only:
            raise Refused("The user may not change the shares.")
        self.policy = None

    def set_share_policy(self, policy: Any) -> Any:
        self.policy = {"shares": [], "only_listed": False, **policy}

    def set_share(self, entry: Any) -> Any:
        assert self.policy is not None
        self.policy["shares"].append(dict(entry))


OWN = SharePolicy((ShareAttributes("research", 0.5, 8),), 900.0, 10, only_listed=True)


@pytest.mark.parametrize("own", [None, OWN])
@pytest.mark.parametrize("wanted", [None, POLICY])
def test_a_replay_sets_the_policy_and_restores_the_policy_of_the_grid(
    tmp_path: Path, own: SharePolicy | None, wanted: SharePolicy | None
) -> None:
    manager = SharedManager(own.to_json() if own else None)
    scenario = load(tmp_path, TEXT)
    state = RunState(scenario, 1, ())
    seen: list[object] = []

    async def run(link: ManagerConnection) -> None:
        with suppress(KeyError):
            async with driver.share_policy(link, wanted, state):
                seen.append(manager.policy)
                raise KeyError("The run fails.")

    link = Line(tmp_path, manager)
    asyncio.run(run(link))
    link.close()
    assert seen == [wanted.to_json() if wanted else None]
    assert manager.policy == (own.to_json() if own else None)
    assert state.cut == ""


def test_a_policy_that_cannot_be_restored_is_reported(tmp_path: Path) -> None:
    manager = SharedManager(OWN.to_json())
    state = RunState(load(tmp_path, TEXT), 1, ())
    state.cut = "It was interrupted."

    async def run(link: ManagerConnection) -> None:
        async with driver.share_policy(link, POLICY, state):
            manager.is_read_only = True

    link = Line(tmp_path, manager)
    asyncio.run(run(link))
    link.close()
    trouble = "The fair-share policy of the grid is not restored: The user may not change the shares."
    assert state.cut == f"It was interrupted. {trouble}"


def test_the_limit_of_a_replay_contains_the_wait_of_a_limited_share(tmp_path: Path) -> None:
    free, limited = load(tmp_path, TEXT), load(tmp_path, LIMITED)
    jobs = expand(free).jobs
    assert driver.limit_s(limited, jobs) - driver.limit_s(free, jobs) == pytest.approx(2 * 12 * 20 * 5.0)
    reserved = replace(free, shares=replace(POLICY, reservation=75))
    work_s = 12 * 20 * 5.0 + 4 * 4 * 2.0
    assert driver.limit_s(reserved, jobs) - driver.limit_s(free, jobs) == pytest.approx(2 * (work_s - work_s / 4))


def test_a_recorded_run_has_its_shares_and_its_policy(tmp_path: Path) -> None:
    record = replace(simulate(compress_scenario(load(tmp_path, TEXT), 10)), backend="local")
    jobs = tuple(replace(run, tasks=run.planned) for run in record.jobs)
    kept = parse(to_json(replace(record, jobs=jobs)), tmp_path)
    assert kept.shares == replace(POLICY, decay_s=30.0)
    recording.write(recording.from_record(kept, "again"), tmp_path / "again.yaml")
    scenario = loader.load(tmp_path / "again.yaml")
    assert scenario.shares == POLICY
    assert {name: template.share for name, template in scenario.jobs.items()} == {"bulk": "bulk", "small": "team1"}


def test_a_record_of_an_earlier_release_has_no_shares(tmp_path: Path) -> None:
    record = simulate(load(tmp_path, TEXT.replace("count: 12", "count: 1")))
    text = re.sub(rb'(?s) "shares":\s*\{.*?\n \},\n', b"", to_json(record))
    text = re.sub(rb',\s*"share": "[a-z0-9]*"', b"", text)
    assert b"share" not in text
    old = parse(text, tmp_path)
    assert old.shares is None
    assert {run.share for run in old.jobs} == {""}


def test_recorded_jobs_of_different_shares_have_different_templates(tmp_path: Path) -> None:
    pairs, measured = [], {}
    for number, share in enumerate(("", "team1", "team1", "team2")):
        made = replace(job(stage(A), id=JobId(f"sums-{number}"), items=1), name="sums", share=share)
        pairs.append(({**a_job(made.id), "submitted_s": 10.0 * number}, made))
        totals = StageTotals("default", 1, (), None, tasks=1, bundles=1, task_s=[1.0])
        measured[made.id] = Measurements({("sums", A): totals})
    pools = load(tmp_path, TEXT).pools
    own = replace(OWN, only_listed=False)  # a scenario does not refuse jobs
    past = recording.from_jobs(pairs, measured, "again", pools, {}, own)  # type: ignore[arg-type]
    recording.write(past, tmp_path / "again.yaml")
    scenario = loader.load(tmp_path / "again.yaml")
    assert scenario.shares == own
    assert [run.template.share for run in expand(scenario).jobs] == ["", "team1", "team1", "team2"]
