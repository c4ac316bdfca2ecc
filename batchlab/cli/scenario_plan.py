"""Command `batchlab scenario plan`, which searches for the cheapest fleet and prints its plan as text and YAML."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import typer
import yaml

from batchlab.cli import output
from batchlab.cli.charts import LINE, Chart, duration
from batchlab.cli.option_values import home_of, seconds_of
from batchlab.cli.options import CALIBRATION, HOME, JSON, LIKE, NO_SHARES, SCENARIO, option
from batchlab.cli.output import INTERRUPTED, Stopped
from batchlab.cli.progress import bar
from batchlab.cli.scenario_records import load_calibration
from batchlab.core import instance_types
from batchlab.core.pricing import price_book
from batchlab.core.pricing.price_book import PriceBook, parse, shown
from batchlab.core.task_sizes import size_warnings
from batchlab.runtime.descriptor import Calibration
from batchlab.scenarios.model.expansion import expand, task_times
from batchlab.scenarios.model.values import Scenario
from batchlab.scenarios.planner.candidates import QUANTILES, Candidate, EvaluatedCandidate, Goal, quantiles
from batchlab.scenarios.planner.plan import REQUIRED_SHARE, Plan, SeedShare, is_enough
from batchlab.scenarios.record import Record

if TYPE_CHECKING:
    from batchlab.scenarios.planner.planner import Search, SearchProgress


def plan(
    scenario: str = SCENARIO,
    deadline: str = option(
        "Longest allowed time from the due time of the first job to the end of the last job, such as 45m or 6h.",
        "TIME",
        default=...,
    ),
    budget: str | None = option("Maximum cost of one run of the scenario, such as '12 USD'.", "AMOUNT"),
    seeds: int = option(
        "Number of new seeds that confirm the found fleet. Each seed needs one simulated run.", "N", default=20, min=1
    ),
    jobs: int | None = option(
        "Number of runs of the scenario that are simulated in parallel.", "N", show_default="the number of CPUs", min=1
    ),
    runs: int = option("Maximum number of runs of the scenario that are simulated in total.", "N", default=300, min=2),
    like: str = LIKE,
    calibration: Path | None = CALIBRATION,
    no_shares: bool = NO_SHARES,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Find the cheapest fleet and policy that completes a scenario in time.

    The command simulates fleets with different sizes, drain targets, prewarming, and Spot shares.
    Ctrl-C ends the search with the best answer so far. The exit code is 1 if no fleet meets the
    deadline and the budget.

    \b
    Example: batchlab scenario plan long-tail --deadline 2h --budget '5 USD'
    """
    from batchlab.runtime import factory
    from batchlab.scenarios.model import loader
    from batchlab.scenarios.planner.fast_model import FastModel
    from batchlab.scenarios.planner.planner import Search

    goal = Goal(seconds_of("--deadline", deadline), None if budget is None else parse(budget))
    backend = factory.load(like).name
    spec = loader.load(loader.find(scenario))
    if no_shares:
        spec = replace(spec, shares=None)
    measured = load_calibration(calibration, backend, spec.compressed)
    book = price_book.load(home_of(home).path)
    run = partial(forecast, backend=backend, calibration=measured, book=book)
    sketch = FastModel(backend, measured, book)
    search = Search(spec, goal, run, seeds, jobs or os.cpu_count() or 1, runs, sketch, book)
    raise typer.Exit(search_and_show(search, json=json))


def forecast(
    scenario: Scenario, seed: int, *, backend: str, calibration: Calibration | None, book: PriceBook | None = None
) -> Record:
    """Simulate one run of a scenario, and return the record of the run. The search for a fleet also calls `forecast` in
    the processes of a process pool.
    """
    from batchlab.runtime import factory
    from batchlab.scenarios.forecast.simulate import simulate

    return simulate(scenario, seed=seed, like=factory.load(backend), calibration=calibration, book=book)


def search_and_show(search: Search, *, json: bool) -> int:
    """Search for the cheapest fleet, print the plan of the found fleet, and return the exit code of the command."""
    interrupted = False
    try:
        with _progress(search):
            search.search()
    except (Stopped, KeyboardInterrupt):
        interrupted = True
        search.cut = "it was interrupted"
    answer = search.answer()
    if answer is None:
        output.say("There is no answer: the search was interrupted before its first candidate was simulated.")
        return INTERRUPTED
    warnings = size_warnings(task_times(answer.planned, expand(answer.planned).jobs))
    doc = {**answer.to_json(), "yaml": as_yaml(answer.planned) + "\n"}
    output.answer(json, {**doc, "warnings": [one.to_json() for one in warnings]}, text(answer))
    output.show_warnings(warnings)
    if interrupted:
        return INTERRUPTED
    return 0 if answer.holds else 1


@contextmanager
def _progress(search: Search) -> Iterator[None]:
    with bar(30.0) as show:
        search.on_progress = lambda progress: show(progress.done, progress.runs, _progress_text(progress))
        yield


def _progress_text(progress: SearchProgress) -> str:
    best, suffix = progress.best, ""
    if best is not None and best.finish_s < float("inf"):
        suffix = f"; best: {shown(best.usd)}, {output.span(best.finish_s)}"
    return f"{progress.done} of at most {progress.runs} runs, {progress.phase}{suffix}"


CHOSEN = "◆"


def text(plan: Plan) -> str:
    """Return the plan of a fleet as text for a terminal."""
    budget = plan.goal.budget_usd
    within = "" if budget is None else f" for at most {shown(budget)}"
    deadline, runs = output.span(plan.goal.deadline_s), output.count(plan.runs, "simulated run")
    lines = [f"Scenario {plan.scenario.name}, all done within {deadline}{within}; {runs}", ""]
    lines += [_verdict(plan), "", *_candidate(plan), "", *_confidence(plan), "", *_frontier(plan), ""]
    lines += ["For this fleet, put these lines into the scenario:", ""]
    lines += [*(f"  {line}" for line in as_yaml(plan.planned).splitlines()), ""]
    if waves := plan.idle_waves:
        at = " and ".join(output.span(fault.at_s) for fault in waves)
        which = f"the spot-wave at {at}" if len(waves) == 1 else f"the spot-waves at {at}"
        lines += [f"Delete {which} from the scenario: this fleet has no Spot instance that it could interrupt.", ""]
    lines += [f"Assumed: {assumption}." for assumption in plan.assumed]
    if plan.cut:
        lines.append(f"The search ended early: {plan.cut}. There may be better fleets.")
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    outcomes = plan.outcomes
    usd, latest = shown(mean(o.usd for o in outcomes)), _span(max(o.finish_s for o in outcomes))
    deadline = output.span(plan.goal.deadline_s)
    if plan.holds:
        return (
            f"Recommended: {usd} a run, {_met_text(plan)} in {plan.met.met} of {plan.met.of} fresh "
            f"seeds, done after {latest} at the latest."
        )
    if not any(map(plan.goal.met, outcomes)) and plan.undone == len(outcomes):
        return _undone(plan)
    if not is_enough(plan.in_time):
        nearest = f"The best fleet found is done after {latest} at the latest, for {usd}."
        if not any(map(plan.goal.in_time, (*outcomes, *plan.chosen.outcomes))):
            return f"No fleet meets the deadline of {deadline}.{_cannot(plan)} {nearest}"
        return (
            f"No fleet was found that meets the deadline of {deadline} in {REQUIRED_SHARE:.0%} of all seeds. {nearest}"
        )
    if not is_enough(plan.met):
        return _too_dear(plan)
    return (
        f"The best so far: {usd} a run, done after {latest} at the latest; tested with "
        f"{len(plan.fresh)} of {output.count(plan.seeds, 'fresh seed')}."
    )


def _cannot(plan: Plan) -> str:
    """Return a sentence if the last job arrives after the deadline, so that every fleet is too slow, or else ""."""
    jobs = expand(plan.scenario).jobs
    span_s = jobs[-1].due_s - jobs[0].due_s if jobs else 0.0
    if span_s < plan.goal.deadline_s:
        return ""
    return f" No fleet can, because the last job is due {output.span(span_s)} after the first job."


def _met_text(plan: Plan) -> str:
    return "in time" if plan.goal.budget_usd is None else "in time and within the budget"


def _undone(plan: Plan) -> str:
    failed = max(outcome.failed_jobs for outcome in plan.outcomes)
    lost = max(outcome.lost for outcome in plan.outcomes)
    reasons = [f"up to {output.count(failed, 'job')} fail"] if failed else []
    reasons += [f"up to {output.count(lost, 'task')} are not done"] if lost else []
    suffix = f": {' and '.join(reasons)}" if reasons else ""
    return f"No tested fleet does all of the work{suffix}. `batchlab scenario simulate` shows one run in detail."


def _too_dear(plan: Plan) -> str:
    budget = shown(plan.goal.budget_usd or 0.0)
    costs = [outcome.usd for outcome in plan.outcomes]
    verdict = (
        f"No fleet was found that is in time for {budget} in {REQUIRED_SHARE:.0%} of all seeds. The best one is both "
        f"in {plan.met.met} of {plan.met.of} seeds, and costs {shown(mean(costs))} on average and "
        f"{shown(max(costs))} at most."
    )
    if (other := plan.affordable) is not None and other.candidate != plan.chosen.candidate:
        return f"{verdict} The fastest fleet for that budget is done after {_span(other.finish_s)}."
    if min(costs) > (plan.goal.budget_usd or 0.0) and other is None:
        return f"{verdict} No tested fleet, however slow, costs so little."
    return verdict


def _span(seconds: float) -> str:
    return output.span(seconds) if math.isfinite(seconds) else "an unknown time"


def _candidate(plan: Plan) -> Iterator[str]:
    candidate = plan.chosen.candidate
    types = [[one.pool.instance_type or "-"] if plan.chooses_types else [] for one in plan.planned.pools]
    yield output.table(
        ("pool", "minimum", "maximum", "spot", *_type_columns(plan)),
        [
            (fleet.pool, fleet.min_size, fleet.max_size, f"{fleet.spot:.0%}", *own)
            for fleet, own in zip(candidate.fleets, types, strict=True)
        ],
    )
    yield f"drain target  {_drain(candidate)}"
    yield f"pre-warm      {_warm(candidate)}"


def _type_columns(plan: Plan) -> tuple[str, ...]:
    return ("instance type",) if plan.chooses_types else ()


def _drain(candidate: Candidate) -> str:
    return "the backend's own" if candidate.drain_s is None else output.span(candidate.drain_s)


def _warm(candidate: Candidate) -> str:
    waves = []
    for prewarm in candidate.prewarm:
        from_, until = output.span(prewarm.at_s), output.span(prewarm.until_s)
        waves.append(f"{prewarm.min_size} in pool {prewarm.pool} from {from_} until {until}")
    return "; ".join(waves) or "nothing"


def _confidence(plan: Plan) -> Iterator[str]:
    outcomes = plan.outcomes
    yield f"{_met_text(plan).capitalize()} {_share(plan, plan.met)}."
    if (share := plan.in_budget) is not None:
        yield f"In time {_share(plan, plan.in_time)}; within the budget {_share(plan, share)}."
    if plan.failed:
        yield f"Before it, {output.count(plan.failed, 'candidate')} failed the test with other fresh seeds."
    if plan.undone:
        yield f"Not all of the work is done in {plan.undone} of {len(outcomes)} seeds."
    if (late := max(outcome.late for outcome in outcomes)) > 0:
        yield f"Up to {output.count(late, 'job')} a run miss their own deadlines."
    if (missed := plan.missed_waves).met:
        yield f"The Spot wave hit no instance in {missed.met} of {missed.of} seeds, so its cost there is unknown."
    finish = quantiles([outcome.finish_s for outcome in outcomes])
    usd = quantiles([outcome.usd for outcome in outcomes])
    yield output.table(
        ("over seeds", *QUANTILES),
        [
            ("done after", *("never" if s is None else output.span(s) for s in finish.values())),
            ("cost", *("-" if u is None else shown(u) for u in usd.values())),
        ],
    )


def _share(plan: Plan, share: SeedShare) -> str:
    low, high = share.interval
    seeds = "fresh seeds" if plan.fresh else "seeds of the search"
    return f"in {share.met} of {share.of} {seeds} (95% interval {low:.0%} to {high:.0%})"


def _frontier(plan: Plan) -> Iterator[str]:
    points = plan.frontier
    if not points:
        yield "No tested fleet completed the work, so there is no frontier of cost against time."
        return
    seeds = output.count(plan.searched, "seed")
    yield f"Mean cost against latest end over {seeds} of the search; {CHOSEN} is the fleet above, ┊ the deadline"
    most_s = max(plan.goal.deadline_s, *(point.finish_s for point in points))
    chart = Chart(most_s, max(point.usd for point in points))
    # The point of the recommended fleet is drawn last, so that other points do not cover the point.
    for point in sorted(points, key=lambda point: point.candidate == plan.chosen.candidate):
        chart.dot(point.finish_s, point.usd, _mark(point, plan))
    chart.wall(plan.goal.deadline_s)
    yield chart.text(output.span, shown)
    yield ""
    yield output.table(
        ("", "cost", "done after", "minimum", "maximum", "spot", *_type_columns(plan), "drain target", "pre-warm"),
        [_row(point, plan) for point in points],
    )


def _mark(point: EvaluatedCandidate, plan: Plan) -> str:
    return CHOSEN if point.candidate == plan.chosen.candidate else LINE


def _row(point: EvaluatedCandidate, plan: Plan) -> tuple[str, ...]:
    fleets = point.candidate.fleets
    sizes = (", ".join(str(fleet.min_size) for fleet in fleets), ", ".join(str(fleet.max_size) for fleet in fleets))
    spot = ", ".join(f"{fleet.spot:.0%}" for fleet in fleets)
    result = (_mark(point, plan), shown(point.usd), output.span(point.finish_s))
    types = (
        [", ".join(fleet.instance.type if fleet.instance else "-" for fleet in fleets)] if plan.chooses_types else []
    )
    return (*result, *sizes, spot, *types, _drain(point.candidate), _warm(point.candidate))


# --- YAML of the plan ----------------------------------------------------------------------------


def as_yaml(scenario: Scenario) -> str:
    """Return the pools, the policy, and the prewarming of a scenario as YAML, to paste into a scenario file."""
    catalog = instance_types.load()
    doc: dict[str, object] = {}
    doc["pools"] = {
        plan.pool.name: _fill(
            min=plan.pool.min_size,
            max=plan.pool.max_size,
            slots=plan.pool.slots,
            boot=duration(plan.pool.boot_s) if plan.pool.boot_s else None,
            instance_type=plan.pool.instance_type or None,
            # Without the key, a pool has the GPUs of its instance type.
            gpus=plan.pool.gpus if plan.pool.gpus or catalog.gpus([plan.pool.instance_type]) else None,
            spot=plan.spot or None,
        )
        for plan in scenario.pools
    }
    policy = scenario.policy
    times = {"drain_target": policy.drain_target_s, "cooldown_in": policy.cooldown_in_s, "idle": policy.idle_s}
    if durations := {name: duration(s) for name, s in times.items() if s is not None}:
        doc["policy"] = durations
    if scenario.prewarm:
        doc["prewarm"] = [
            {"pool": one.pool, "min": one.min_size, "at": duration(one.at_s), "until": duration(one.until_s)}
            for one in scenario.prewarm
        ]
    return str(yaml.safe_dump(doc, sort_keys=False, default_flow_style=None, width=100)).rstrip()


def _fill(**values: object) -> Mapping[str, object]:
    return {name: value for name, value in values.items() if value is not None}
