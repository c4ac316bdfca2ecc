"""The steps of a rehearsal with fakes: their order, their limits, the budget, the removal, and the report."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from batchlab.cli import output, rehearsal, rehearsal_steps
from batchlab.cli.rehearsal import Signals, check_cost
from batchlab.cli.rehearsal_jobs import Expected, expect, sleeping
from batchlab.cli.rehearsal_steps import Site
from batchlab.core.errors import BackendError, Refused, UsageError
from batchlab.core.operating_system import since_boot_s
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import Usd
from batchlab.deploy import template
from batchlab.deploy.account import Account
from batchlab.deploy.rehearsal import (
    Budget,
    NotTried,
    Outcome,
    Rehearsal,
    Step,
    StepNotes,
    StepResult,
    TimeLimit,
    count_outcomes,
)
from batchlab.deploy.rehearsal_report import Redaction, markdown, masked
from batchlab.deploy.settings import PoolSettings, Settings
from batchlab.deploy.stack import Stack
from batchlab.runtime.home import Home
from tests.support.cli import runner

ACCOUNT = "123456789012"
RICH = Budget(1000.0, 1.0, 0.0, 0.0)


class World:
    """A clock that only steps advance, and a record of the steps that ran. `behavior` maps the name of a step to its
    action."""

    def __init__(self, **behavior: Callable[[], None]) -> None:
        self.now_s = 0.0
        self.ran: list[str] = []
        self.said: list[str] = []
        self.interruptions = 0
        self.behavior = behavior

    def step(self, name: str, *needs: str, limit_s: float = 100.0, removes: bool = False) -> Step:
        def run(notes: StepNotes) -> None:
            self.ran.append(name)
            notes.done.append(f"{name} began.")
            self.behavior.get(name, lambda: None)()

        return Step(name, f"do {name}", run, limit_s, needs, removes)

    def steps(self) -> list[Step]:
        return [
            self.step("stack"),
            self.step("conform"),
            self.step("job", "stack"),
            self.step("kill", "stack", "job"),
            self.step("destroy", removes=True),
            self.step("leftovers", removes=True),
        ]

    @contextmanager
    def limited(self, _: float) -> Iterator[None]:
        yield

    def spend(self, seconds: float) -> None:
        self.now_s += seconds

    def rehearsal(self, budget: Budget = RICH, **more: Any) -> Rehearsal:
        return Rehearsal(self.steps(), budget, self, say=self.said.append, clock=lambda: self.now_s, **more)


def outcomes(rehearsal: Rehearsal) -> dict[str, str]:
    return {result.name: result.outcome.value for result in rehearsal.results}


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_all_steps_run_in_order() -> None:
    world = World(job=lambda: world.spend(7.0))
    began: list[str] = []
    done = world.rehearsal(on_begin=lambda step, _: began.append(step.name))
    done.run()
    assert world.ran == began == ["stack", "conform", "job", "kill", "destroy", "leftovers"]
    assert set(outcomes(done).values()) == {"passed"}
    assert done.has_succeeded
    assert done.results[2].seconds == 7.0
    assert count_outcomes(done.results) == "6 of 6 steps passed, 0 failed, and 0 were not tried."


@pytest.mark.parametrize(
    ("broken", "skipped"),
    [("stack", ["job", "kill"]), ("conform", []), ("job", ["kill"]), ("kill", []), ("destroy", []), ("leftovers", [])],
)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BackendError("AWS refuses it.", remedy="Ask for it."), "AWS refuses it. Ask for it."),
        (ZeroDivisionError("oh"), "An unexpected error occurred: ZeroDivisionError: oh"),
    ],
)
def test_a_failed_step_prevents_only_the_steps_that_need_it(
    broken: str, skipped: list[str], error: Exception, reason: str
) -> None:
    world = World(**{broken: raising(error)})
    done = world.rehearsal()
    done.run()
    found = {result.name: result for result in done.results}
    assert (found[broken].outcome, found[broken].reason) == (Outcome.FAILED, reason)
    assert found[broken].notes.done == [f"{broken} began."]
    assert [name for name, result in found.items() if result.outcome is Outcome.NOT_TRIED] == skipped
    assert all("did not pass" in found[name].reason for name in skipped)
    assert world.ran == [name for name in found if name not in skipped]
    assert not done.has_succeeded


def test_an_impossible_step_is_not_tried_and_is_not_a_failure() -> None:
    done = World(kill=raising(NotTried("An emulator does not have this service."))).rehearsal()
    done.run()
    assert outcomes(done)["kill"] == "not tried"
    assert done.results[3].reason == "An emulator does not have this service."
    assert done.has_succeeded
    assert "1 was not tried" in count_outcomes(done.results)


@pytest.mark.parametrize("error", [SystemExit(130), KeyboardInterrupt()])
def test_after_an_interruption_only_the_removal_runs(error: BaseException) -> None:
    world = World(conform=raising(error))
    done = world.rehearsal()
    done.run()
    assert world.ran == ["stack", "conform", "destroy", "leftovers"]
    assert outcomes(done)["conform"] == "failed"
    assert outcomes(done)["job"] == "not tried"
    assert done.is_interrupted
    assert not done.has_succeeded


def test_the_first_interruption_does_not_stop_the_removal_and_the_second_does() -> None:
    left = [SystemExit(130)]
    world = World(destroy=lambda: raising(left.pop())() if left else None)
    done = world.rehearsal()
    done.run()
    assert world.ran.count("destroy") == 2
    assert outcomes(done)["destroy"] == "passed"
    assert done.is_interrupted
    assert any("The removal continues" in text for text in world.said)

    world = World(destroy=raising(SystemExit(130)))
    done = world.rehearsal()
    done.run()
    assert world.ran.count("destroy") == 2
    assert outcomes(done)["destroy"] == "failed"
    assert world.ran[-1] == "leftovers"


def test_after_an_interrupted_step_the_first_interruption_of_the_removal_is_a_warning() -> None:
    """A user who presses Ctrl-C twice must not leave a stack behind without a warning."""
    world = World(job=raising(SystemExit(130)), destroy=raising(SystemExit(130)))
    done = world.rehearsal()
    done.run()
    assert world.ran == ["stack", "conform", "job", "destroy", "destroy", "leftovers"]
    assert world.said == ["Interrupted. The removal continues. Another interruption stops the removal."]


@pytest.mark.parametrize("later", [BackendError("A request failed."), NotTried("It is impossible."), None])
def test_an_interruption_whose_exception_is_lost_counts(later: Exception | None) -> None:
    """An error of a `finally` block may replace the exception of the signal."""

    def lose() -> None:
        world.interruptions += 1
        if later:
            raise later

    world = World(conform=lose)
    done = world.rehearsal()
    done.run()
    assert world.ran == ["stack", "conform", "destroy", "leftovers"]
    assert done.is_interrupted
    assert outcomes(done)["job"] == "not tried"


def test_an_interruption_after_the_time_limit_stops_the_rehearsal() -> None:
    def hang() -> None:
        world.spend(101.0)
        raise SystemExit(130)

    world = World(conform=hang)
    done = world.rehearsal()
    done.run()
    assert world.ran == ["stack", "conform", "destroy", "leftovers"]
    assert done.is_interrupted


def test_a_step_that_takes_too_long_fails_alone() -> None:
    def hang() -> None:
        world.spend(100.0)
        raise TimeLimit

    world = World(job=hang)
    done = world.rehearsal()
    done.run()
    assert done.results[2].reason == "The step did not end within 1 min 40 s."
    assert not done.is_interrupted
    assert world.ran == ["stack", "conform", "job", "destroy", "leftovers"]


def test_the_budget_reserves_the_removal() -> None:
    budget = Budget(usd=2.0, usd_per_h=1.0, fixed_usd=0.5, reserve_s=1800.0)
    assert budget.spent_usd(3600.0) == 1.5
    assert budget.left_s(0.0) == 3600.0
    assert budget.spent_usd(budget.left_s(0.0) + budget.reserve_s) == budget.usd


def test_a_running_step_stops_when_the_budget_is_reached() -> None:
    limits: list[float] = []

    def hang() -> None:
        world.spend(60.0)
        raise TimeLimit

    world = World(stack=lambda: world.spend(40.0), conform=hang)
    # The budget lasts for 100 s.
    budget = Budget(usd=100 / 3600, usd_per_h=1.0, fixed_usd=0.0, reserve_s=0.0)
    done = world.rehearsal(budget, on_begin=lambda _, limit_s: limits.append(limit_s))
    done.run()
    assert limits[:2] == [pytest.approx(100.0), pytest.approx(60.0)]
    assert "the cost may reach the budget of 0.0278 USD" in done.results[1].reason
    assert world.ran == ["stack", "conform", "destroy", "leftovers"]
    assert done.results[2].reason == "The cost may have reached the budget of 0.0278 USD."
    assert limits[2:] == [100.0, 100.0], "the removal has its own limit"
    assert done.is_over_budget
    assert not done.has_succeeded


def test_a_removal_that_takes_longer_than_its_reserve_exceeds_the_budget() -> None:
    world = World(destroy=lambda: world.spend(90.0))
    done = world.rehearsal(Budget(usd=100 / 3600, usd_per_h=1.0, fixed_usd=0.5 / 3600, reserve_s=10.0))
    done.run()
    assert done.has_succeeded
    world = World(destroy=lambda: world.spend(100.0))
    done = world.rehearsal(Budget(usd=100 / 3600, usd_per_h=1.0, fixed_usd=0.5 / 3600, reserve_s=10.0))
    done.run()
    assert set(outcomes(done).values()) == {"passed"}
    assert done.is_over_budget
    assert not done.has_succeeded


@pytest.mark.parametrize("place", ["on_begin", "on_end"])
def test_an_error_of_the_report_does_not_prevent_the_removal(place: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    world = World()
    done = world.rehearsal()
    setattr(done, place, fail)
    done.run()
    assert world.ran[-2:] == ["destroy", "leftovers"]
    assert world.said[0] == "The report is incomplete: OSError: disk full"


def test_a_closed_terminal_does_not_prevent_the_removal() -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError

    world = World()
    done = world.rehearsal(on_begin=fail, on_end=fail)
    done.say = fail
    done.run()
    assert world.ran[-2:] == ["destroy", "leftovers"]


# --- Signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_step_or_the_next_step(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Signals() as signals:
        with pytest.raises(SystemExit), signals.limited(60.0):
            signal.raise_signal(number)
        signal.raise_signal(number)  # between two steps
        with pytest.raises(SystemExit), signals.limited(60.0):
            pytest.fail("The step must not begin.")
        with signals.limited(60.0):
            pass
    assert signal.getsignal(number) is before


def test_the_end_of_the_terminal_stops_a_step_and_silences_the_output() -> None:
    before = sys.stdout, sys.stderr
    try:
        with Signals() as signals:
            with pytest.raises(SystemExit), signals.limited(60.0):
                signal.raise_signal(signal.SIGHUP)
            assert signals.interruptions == 1
            assert sys.stderr.name == sys.stdout.name == os.devnull
        # The end of the command prints the result.
        assert sys.stderr.name == sys.stdout.name == os.devnull
        sys.stdout.close()
        sys.stderr.close()
    finally:
        sys.stdout, sys.stderr = before


def test_a_closed_pipe_silences_the_output() -> None:
    """Ctrl-C also ends `tee` in `batchlab deploy rehearse 2>&1 | tee log`, after which each message is an error."""
    reader, writer = os.pipe()
    os.close(reader)
    before = sys.stdout, sys.stderr
    pipe = os.fdopen(writer, "w")
    try:
        sys.stderr = pipe
        with Signals() as signals, signals.limited(60.0):
            output.say("destroy: destroy the stack")
            output.say("42 resources are deleted")
        output.say("The rehearsal failed")
        assert sys.stderr.name == os.devnull
        assert sys.stdout is before[0]
        sys.stderr.close()
    finally:
        sys.stdout, sys.stderr = before
    with suppress(BrokenPipeError):
        pipe.close()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals, signals.limited(60.0):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_limit_stops_a_step() -> None:
    with Signals() as signals:
        with pytest.raises(TimeLimit), signals.limited(0.01):
            time.sleep(5)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
        assert signals.interruptions == 0


def test_the_time_for_which_the_machine_was_suspended_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack costs money while the laptop that created it is suspended."""
    asleep_s = 0.0
    monkeypatch.setattr(rehearsal, "_CHECK_S", 0.01)
    monkeypatch.setattr(rehearsal, "since_boot_s", lambda: time.monotonic() + asleep_s)

    def suspend() -> None:
        nonlocal asleep_s
        time.sleep(0.05)
        asleep_s = 3600.0
        time.sleep(5)

    with Signals() as signals, pytest.raises(TimeLimit), signals.limited(3600.0):
        suspend()
    assert Rehearsal([], RICH, World()).clock is since_boot_s


# --- Cost ----------------------------------------------------------------------------------------


def expected(
    tmp_path: Path, *, region: str = "us-east-1", types: tuple[str, ...] = ("m7i.large", "m6i.large"), **more: Any
) -> Expected:
    pool = PoolSettings("default", max_size=2, slots=2, types=types)
    wanted = Settings(rehearsal_steps.STACK, region, (pool,), **more)
    jobs = [sleeping("worker-kill", tmp_path)]
    return expect(wanted, template.load(template.shipped_template()), Home(tmp_path / "home"), jobs)


def test_the_highest_cost_covers_the_expected_cost(tmp_path: Path) -> None:
    found = expected(tmp_path)
    items = {item.what: item.usd for item in found.items}
    assert {"EC2 workers", "SQS", "S3", "conform", "fault injection", "VPC endpoints"} <= items.keys()
    assert sum(usd.high for usd in items.values()) <= found.highest_usd
    # Two on-demand workers and the idle stack for the whole time are the upper bound.
    (worker,) = found.hourly.workers
    assert found.usd_per_h == pytest.approx(found.hourly.idle_usd_h.high + 2 * worker.on_demand.high)
    assert 0.3 < found.highest_usd < 5.0


def test_a_database_takes_longer_and_costs_more(tmp_path: Path) -> None:
    small = expected(tmp_path / "a")
    large = expected(tmp_path / "b", parameters=(("Ledger", "postgres"),))
    assert large.seconds > small.seconds
    assert large.highest_usd > small.highest_usd


def test_prices_of_another_region_have_a_margin(tmp_path: Path) -> None:
    """The highest cost must also hold in a region whose prices are unknown."""
    known, unknown = expected(tmp_path / "a"), expected(tmp_path / "b", region="sa-east-1")
    assert not known.note
    assert "not of sa-east-1" in unknown.note
    assert unknown.usd_per_h == pytest.approx(2 * known.usd_per_h)
    assert unknown.highest_usd == pytest.approx(2 * known.highest_usd)


def test_the_highest_cost_is_that_of_the_most_expensive_instance_type(tmp_path: Path) -> None:
    """AWS may start any of a pool's types."""
    cheap = expected(tmp_path / "a")
    mixed = expected(tmp_path / "b", types=("m7i.large", "m7i.2xlarge"))
    book = price_book.load(None)
    more = book.instance_usd_h("m7i.2xlarge").high - book.instance_usd_h("m7i.large").high
    assert mixed.usd_per_h == pytest.approx(cheap.usd_per_h + 2 * more)


def test_metered_usage_above_the_highest_estimate_is_a_failure() -> None:
    rehearsal_steps.check_bill(Usd(0.1, 0.2, 0.3), Usd.exactly(0.3))
    with pytest.raises(BackendError, match=r"costs 0.31 USD, more than the estimate of"):
        rehearsal_steps.check_bill(Usd(0.1, 0.2, 0.3), Usd.exactly(0.31))


def test_a_cost_above_the_budget_is_refused(tmp_path: Path) -> None:
    found = expected(tmp_path)
    check_cost(found, 5.0)
    with pytest.raises(UsageError, match=r"may cost .* USD, and the budget is 0.1 USD"):
        check_cost(found, 0.1)


def test_without_a_budget_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    monkeypatch.setattr(rehearsal, "opened", lambda *_: pytest.fail("There must be no call to AWS."))
    code, out, err = run("deploy", "rehearse", "--yes", "--home", tmp_path)
    assert (code, out) == (2, "")
    assert "needs a budget" in err
    code, _, err = run("deploy", "rehearse", "--yes", "--budget", "5EUR", "--home", tmp_path)
    assert code == 2
    assert "USD" in err


@pytest.mark.parametrize("name", ["batchlab-", "batchlab-tasks-default", "batchlab-conform-1234567"])
def test_a_damaged_record_removes_no_other_queues(name: str) -> None:
    place = {"account": ACCOUNT, "region": "us-east-1"}
    for run in ("batchlab-conform-0123abcd", ""):
        assert rehearsal_steps._recorded_place({**place, "run": run})["run"] == run
    with pytest.raises(ValueError, match="run is"):
        rehearsal_steps._recorded_place({**place, "run": name})


def site(tmp_path: Path, region: str, account: str) -> Site:
    place = Account(region, account, f"arn:aws:iam::{account}:user/me")
    home = Home(tmp_path / "home")
    home.make()
    wanted, jobs, cost = Settings(rehearsal_steps.STACK, region), [sleeping("x", tmp_path)], expected(tmp_path / "job")
    source = template.load(template.shipped_template())
    return Site(Stack(place, rehearsal_steps.STACK), wanted, source, home, tmp_path, lambda: tmp_path, jobs, cost)


@pytest.mark.parametrize("place", [("eu-west-1", "123456789012"), ("us-east-1", "210987654321")])
def test_a_killed_rehearsal_elsewhere_is_not_forgotten(tmp_path: Path, place: tuple[str, str]) -> None:
    """A rehearsal does not find the resources of another region or account."""
    killed = site(tmp_path / "a", "us-east-1", ACCOUNT)
    killed.check_place()
    killed._write_record("batchlab-conform-0123abcd")
    killed.check_place()
    other = site(tmp_path / "b", *place)
    other.home = killed.home
    with pytest.raises(UsageError, match=rf"A rehearsal in us-east-1, account {ACCOUNT}, may have left resources") as e:
        other.check_place()
    assert f"delete {killed.record}" in e.value.remedy


def test_a_folder_has_one_rehearsal_at_a_time(tmp_path: Path) -> None:
    """The second rehearsal would destroy the stack of the first."""
    home = Home(tmp_path)
    with rehearsal._alone(home), pytest.raises(Refused, match="A rehearsal is running"), rehearsal._alone(home):
        pytest.fail("The second rehearsal must not begin.")
    with rehearsal._alone(home):
        pass


# --- Report --------------------------------------------------------------------------------------


def test_only_four_digits_of_the_account_are_shown() -> None:
    assert masked(ACCOUNT) == "********9012"


def test_secrets_are_removed_from_all_texts() -> None:
    redaction = Redaction(ACCOUNT, ("the-managers-secret-token", ""))
    url = "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F1&X-Amz-Signature=0f1e&Expires=1"
    document = {
        "a": [f"arn:aws:iam::{ACCOUNT}:user/eve may not do it.", "token the-managers-secret-token"],
        "b": {"c": url, "d": 1.5, "e": None, "f": True},
        "g": f"AKIAIOSFODNN7EXAMPLE in {Path.home()}/grid",
    }
    cleaned = redaction.apply(document)
    text = json.dumps(cleaned)
    for secret in (ACCOUNT, "the-managers-secret-token", "AKIAIOSFODNN7EXAMPLE", "0f1e", str(Path.home())):
        assert secret not in text
    assert cleaned["a"][0] == "arn:aws:iam::********9012:user/eve may not do it."
    assert cleaned["b"]["d"] == 1.5
    assert cleaned["b"]["e"] is None
    assert cleaned["b"]["f"] is True
    assert cleaned["g"] == "[hidden] in ~/grid"


def test_a_home_folder_at_the_root_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    assert Redaction(ACCOUNT).apply("aws s3 rb s3://bucket, /work/x") == "aws s3 rb s3://bucket, /work/x"


def test_the_page_has_each_step_with_its_reason_and_comparisons() -> None:
    notes = StepNotes(["It ran."], figures={"x_s": 1.0})
    notes.compare("start | of it", "90 s", "2.0 s\nlater")
    steps = [
        StepResult("stack", "create the stack", Outcome.PASSED, "", 3.2, notes),
        StepResult("spot notice", "interrupt", Outcome.NOT_TRIED, "An emulator does not have it.", 0.0, StepNotes()),
    ]
    document = {
        "verdict": "The rehearsal failed: x",
        "about": {"account": "********9012"},
        "expected": {"text": "It costs 1 USD.", "items": [{"what": "manager", "text": "1 USD", "how": "1 h"}]},
        "steps": [step.to_json() for step in steps],
        "left": [{"resource": "sqs:queue a", "command": "batchlab gc --aws"}],
    }
    page = markdown(document)
    assert "| stack | create the stack | passed | 3.2 s |" in page
    assert "## Spot notice: not tried\n\nAn emulator does not have it." in page
    assert r"| start \| of it | 90 s | 2.0 s later |" in page
    assert "| sqs:queue a | `batchlab gc --aws` |" in page
    assert "Nothing was found." in markdown({**document, "left": []})
