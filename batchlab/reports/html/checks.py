"""Checks of the whole run: size and timing of the fleet, waste, and cost.

Invariants: each check of the fleet returns a finding with figures that the page also shows. A check
without a problem reports what it examined, so every page lists all checks.

Checks of single stages: the size of their tasks and the resources that they need.

Invariants: each check examines every stage and returns a finding for each stage with a problem. A
finding contains the figure on which it is based. If a change is due, it also names the setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from batchlab.core.text import count, span
from batchlab.reports.html.metrics import LONG_ON_SPOT_S, TINY_S, Signs, StageSigns
from batchlab.reports.html.source import share, visible

MATTERS_S = 5.0
"""Shorter times in seconds cause no finding, even if they are a large share of a short run."""


class Level(IntEnum):
    """Importance of a finding. A higher level comes first."""

    GOOD = 0
    NOTE = 1
    ACT = 2
    WRONG = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check.

    `check` is the name of the check, and `figure` is the evidence. `setting` describes what to
    change, with code between backticks. It is empty if the level is GOOD.
    """

    check: str
    level: Level
    title: str
    figure: str
    setting: str = ""


Check = Callable[[Signs], Iterator[Finding]]


def good(check: str, title: str, figure: str) -> Finding:
    return Finding(check, Level.GOOD, title, figure)


def name(text: str) -> str:
    """Return the name of a stage or pool, safe for use in a sentence."""
    return visible(text, 40).replace("`", "'")


def limits(pool: str, option: str) -> str:
    """Return the command that changes a pool's limits."""
    return f"`batchlab grid scale {name(pool) or 'POOL'} {option} N`"


def slots_of(pool: str) -> str:
    """Return the option that changes the slots of a pool's instances."""
    return f"`--pool {name(pool) or 'NAME'}:MIN-MAXxSLOTS` of `batchlab grid up`"


TINY_SHARE = 0.5
OVERHEAD = 0.2
SLOWED = 1.3
TOLD = 3
"""Maximum number of stages in a finding without a problem."""

FINER = "Cut the input finer (`size` in the job file's `input`)"


def tiny(signs: Signs) -> Iterator[Finding]:
    """Check for stages with tasks below 100 ms. Each task costs a message, a commit, and a row."""
    hit = [
        stage_signs
        for stage_signs in signs.stages
        if stage_signs.bundles and stage_signs.tiny > TINY_SHARE * stage_signs.tasks
    ]
    for stage in hit:
        second = max(1, math.ceil(1.0 / max(stage.median_s, 1e-4)))
        yield Finding(
            "task size",
            Level.ACT if _costly(stage) else Level.NOTE,
            f"Tasks of {name(stage.name)} are tiny",
            f"Half of its {count(stage.tasks, 'task')} took at most {span(stage.median_s)}, and "
            f"{share(stage.tiny, stage.tasks)} less than {span(TINY_S)}. A bundle carried "
            f"{stage.per_bundle:,.1f} of them, and {share(stage.overhead_s, stage.took_s)} of the "
            "slot time of bundles went to something else than tasks.",
            "Give a task more to do: a larger `size` in the job file's `input`. Or leave `bundle` "
            f"of the stage at `auto`, or set it to about {second:,}: a message then carries a "
            "second of work.",
        )
    if not hit:
        told = [f"{name(stage_signs.name)} {span(stage_signs.median_s)}" for stage_signs in signs.stages[:TOLD]]
        figure = f"Median run time: {', '.join(told)}." if told else "No task ran."
        yield good("task size", "No stage is made of tiny tasks", figure)


def _costly(stage: StageSigns) -> bool:
    return stage.overhead_s > OVERHEAD * stage.took_s


def overhead(signs: Signs) -> Iterator[Finding]:
    """Check how much of the bundles' time no task ran, for stages without tiny tasks."""
    hit = [
        stage_signs
        for stage_signs in signs.stages
        if _costly(stage_signs)
        and stage_signs.overhead_s > MATTERS_S
        and stage_signs.tiny <= TINY_SHARE * stage_signs.tasks
    ]
    for stage in hit:
        yield Finding(
            "overhead",
            Level.ACT,
            f"Bundles of {name(stage.name)} take longer than their tasks",
            f"{share(stage.overhead_s, stage.took_s)} of their slot time, "
            f"{span(stage.overhead_s / max(1, stage.bundles))} a bundle, went to fetching inputs, "
            "starting processes and committing.",
            "Make inputs and results smaller, import less where a handler starts, or let a message "
            "carry more tasks: `bundle` of the stage.",
        )
    if not hit:
        took_s = sum(stage_signs.took_s for stage_signs in signs.stages)
        spent_s = sum(stage_signs.overhead_s for stage_signs in signs.stages)
        yield good(
            "overhead",
            "Bundles are mostly tasks",
            f"{share(spent_s, took_s)} of the slot time of bundles went to something else than tasks.",
        )


def long_on_spot(signs: Signs) -> Iterator[Finding]:
    """Check for tasks above 10 minutes on Spot instances, which get a notice of 2 minutes."""
    hit = [stage_signs for stage_signs in signs.stages if stage_signs.long_on_spot]
    for stage in hit:
        yield Finding(
            "long tasks on Spot",
            Level.ACT,
            f"Tasks of {name(stage.name)} are long for Spot",
            f"{count(stage.long_on_spot, 'task')} of more than {span(LONG_ON_SPOT_S)} ran on Spot "
            f"instances, the longest for {span(stage.longest_on_spot_s)}; when one is interrupted "
            f"its task begins anew. {span(signs.lost_s)} of slot time went with instances.",
            f"{FINER}, or keep the stage off Spot: a `pool` of its own, or `--on-demand-percent "
            "100` of `batchlab deploy apply`.",
        )
    if not hit:
        longest_s = max((stage_signs.longest_on_spot_s for stage_signs in signs.stages), default=0.0)
        figure = f"The longest there took {span(longest_s)}." if longest_s else "None ran on Spot."
        yield good("long tasks on Spot", "No task was too long for Spot", figure)


def too_long(signs: Signs) -> Iterator[Finding]:
    """Check for tasks above 11 hours. SQS hides a message for at most 12 hours."""
    hit = [stage_signs for stage_signs in signs.stages if stage_signs.too_long]
    for stage in hit:
        yield Finding(
            "task length",
            Level.ACT,
            f"Tasks of {name(stage.name)} come close to the 12 hours of SQS",
            f"{count(stage.too_long, 'task')} took more than 11 h, the longest "
            f"{span(stage.longest_s)}. Beyond 12 h a task is handed over to a delayed message, and "
            "with its worker half a day is lost.",
            f"{FINER}, or split the stage into two that follow each other.",
        )
    if not hit:
        longest_s = max((stage_signs.longest_s for stage_signs in signs.stages), default=0.0)
        yield good("task length", "No task took longer than 11 h", f"The longest took {span(longest_s)}.")


def crowding(signs: Signs) -> Iterator[Finding]:
    """Check for tasks that run slower when other tasks share their instance."""
    known = [
        (stage_signs, stage_signs.alone_s, stage_signs.crowded_s)
        for stage_signs in signs.stages
        if stage_signs.alone_s is not None and stage_signs.crowded_s is not None
    ]
    hit = [(stage_signs, alone, crowded) for stage_signs, alone, crowded in known if crowded > SLOWED * alone]
    for stage, alone_s, crowded_s in hit:
        times = f"{crowded_s / alone_s:.1f} times as long" if alone_s else "far longer"
        yield Finding(
            "shared slots",
            Level.ACT,
            f"Tasks of {name(stage.name)} slow each other down",
            f"A task took {span(crowded_s)} on average while the other slots of its instance were "
            f"busy, and {span(alone_s)} while they were idle: {times}. They share more cores, "
            "memory or disk than there is.",
            f"Fewer slots for each instance ({slots_of(stage.pool)}), `slots` in the stage's "
            "`resources`, or instances with more CPUs.",
        )
    if not hit:
        told = [
            f"{name(stage_signs.name)} {crowded / alone:.2f} times as long"
            for stage_signs, alone, crowded in known[:TOLD]
            if alone
        ]
        yield good(
            "shared slots",
            "Tasks do not slow each other down",
            f"With busy neighbours a task took: {', '.join(told)} as with idle ones."
            if told
            else "No stage had tasks both alone on an instance and beside others.",
        )


FILLED = 0.6
IDLE, VERY_IDLE = 0.35, 0.6
UNUSED = 0.25
STARVED = 0.2
FULL = 0.5
LAG = 0.15
TAIL = 0.25
WASTED = 0.05


def idle_slots(signs: Signs) -> Iterator[Finding]:
    """Check whether busy instances use only a few of their slots."""
    if signs.filled is None:
        yield good("idle slots", "No instance is half idle", "Each has one slot, or ran nothing.")
        return
    figure = (
        f"While an instance ran anything of this job, {share(signs.filled, 1)} of its {signs.slots_each} slots did."
    )
    if signs.filled < FILLED and signs.busy_s > MATTERS_S:
        yield Finding(
            "idle slots",
            Level.NOTE,
            "Slots of busy instances are idle",
            figure,
            f"Fewer slots on smaller instances ({slots_of(signs.pool)}), or a longer "
            "`drain_target_s` in `settings.toml`: fewer instances are then filled better.",
        )
    else:
        yield good("idle slots", "Busy instances are filled", figure)


def lag(signs: Signs) -> Iterator[Finding]:
    """Check how long work waited for instances to come into service."""
    wait_s = signs.first_wait_s or 0.0
    boots = ""
    if signs.boots and signs.boot_s is not None:
        boots = (
            f" {count(signs.boots, 'instance')} booted, half of them in at most "
            f"{span(signs.boot_s)}, the slowest in {span(signs.longest_boot_s or 0.0)}."
        )
    figure = f"The first task began {span(wait_s)} after it was ready: {share(wait_s, signs.span_s)} of the run.{boots}"
    if wait_s > max(LAG * signs.span_s, MATTERS_S):
        yield Finding(
            "scaling lag",
            Level.ACT,
            "Work waited for instances to come up",
            figure,
            f"Keep some ready ({limits(signs.pool, '--min')}), or have them before a known peak "
            f"({limits(signs.pool, '--desired')}); a machine image with everything in it boots "
            "sooner.",
        )
    else:
        yield good("scaling lag", "Instances were there in time", figure)


def too_small(signs: Signs) -> Iterator[Finding]:
    """Check whether all slots were busy for most of the run while tasks waited."""
    figure = (
        f"For {share(signs.full_s, signs.span_s)} of the run nearly all slots were busy while "
        f"tasks waited; at most {signs.peak_slots:,.0f} slots were in service."
    )
    if signs.full_s > max(FULL * signs.span_s, MATTERS_S):
        yield Finding(
            "fleet too small",
            Level.NOTE,
            "A larger fleet would have ended it sooner",
            f"{figure} Twice as many would have saved up to {span(signs.full_s / 2)}, for about "
            "the same instance time.",
            f"A higher maximum ({limits(signs.pool, '--max')}), or a shorter `drain_target_s` in `settings.toml`.",
        )
    else:
        yield good("fleet too small", "The fleet was not too small", figure)


def too_large(signs: Signs) -> Iterator[Finding]:
    """Check whether the fleet had too much idle slot time."""
    idle_s = max(0.0, signs.slot_s - signs.busy_s)
    of = count(signs.instances, signs.noun)
    ran = f"{signs.unused:,} of {of} never ran any." if signs.unused else f"{of} ran some of it."
    figure = (
        f"{share(idle_s, signs.slot_s)} of the slot time in service, {span(idle_s)}, was not used by this job; {ran}"
    )
    unused = signs.unused > UNUSED * signs.instances
    if signs.slot_s and (unused or idle_s > max(IDLE * signs.slot_s, MATTERS_S)):
        yield Finding(
            "fleet too large",
            Level.ACT if unused or idle_s > VERY_IDLE * signs.slot_s else Level.NOTE,
            "The fleet was larger than its work",
            figure,
            f"A lower maximum ({limits(signs.pool, '--max')}), a longer `drain_target_s`, so that "
            "fewer come, or a shorter `idle_s`, so that they leave sooner, both in "
            "`settings.toml`.",
        )
    else:
        yield good("fleet too large", "The fleet was not too large", figure)


def idle_cost(signs: Signs) -> Iterator[Finding]:
    """Check whether idle instance time cost more than the work.

    Idle instance time includes the boot, the tail, and the minimum of 60 billed seconds.
    """
    if not signs.total:
        yield good("idle cost", "Idle instances cannot be judged", "The run has no prices.")
        return
    total = float(signs.total)
    figure = (
        f"Idle instance time (boot, waiting, tail, and what is billed at least) is "
        f"{share(float(signs.idle), total)} of the bill, compute is "
        f"{share(float(signs.compute), total)}."
    )
    if signs.idle > signs.compute:
        yield Finding(
            "idle cost",
            Level.NOTE,
            "Instances cost more idle than at work",
            figure,
            "An instance is paid from its launch, for 60 s at the least: for short jobs have fewer "
            f"({limits(signs.pool, '--max')}), or let several jobs use the same ones, with a "
            "longer `idle_s` in `settings.toml`.",
        )
    else:
        yield good("idle cost", "Instances cost less idle than at work", figure)


def starved(signs: Signs) -> Iterator[Finding]:
    """Check whether slots were idle while tasks were ready."""
    figure = (
        f"{share(signs.starved_s, signs.slot_s)} of the slot time, {span(signs.starved_s)}, was "
        "idle while tasks were ready."
    )
    if signs.starved_s > max(STARVED * signs.slot_s, MATTERS_S):
        yield Finding(
            "idle while work waits",
            Level.ACT,
            "Slots were idle while tasks waited",
            figure,
            "Smaller bundles (`bundle` of the stage) spread over more slots; tasks that take "
            "several `slots` leave some empty; other jobs of the pool with a higher `priority` "
            "have theirs first.",
        )
    else:
        yield good("idle while work waits", "Hardly a slot was idle while tasks waited", figure)


def tail(signs: Signs) -> Iterator[Finding]:
    """Check whether a few long tasks delayed the end of the run."""
    figure = (
        f"For the last {span(signs.tail_s)}, {share(signs.tail_s, signs.span_s)} of the run, less "
        "than half as many tasks ran as at most."
    )
    if signs.stages and signs.tail_s > max(TAIL * signs.span_s, MATTERS_S):
        longest = max(signs.stages, key=lambda one: one.longest_s)
        yield Finding(
            "long tail",
            Level.NOTE,
            "The run waited for its last tasks",
            f"{figure} The longest task took {span(longest.longest_s)}, in {name(longest.name)}, "
            f"where half took at most {span(longest.median_s)}.",
            f"{FINER}, or begin with the large items.",
        )
    else:
        yield good("long tail", "The run had no long tail", figure)


def wasted(signs: Signs) -> Iterator[Finding]:
    """Check for wasted slot time, and for tasks with two results."""
    if signs.harmful:
        yield Finding(
            "duplicates",
            Level.WRONG,
            "A task has two results",
            f"{count(signs.harmful, 'task')} got a second committed result, which must never be.",
            "Report it as a bug, with this page; `batchlab ledger rebuild` counts anew what the bucket says.",
        )
    all_s = signs.busy_s + signs.lost_s + signs.repeated_s
    figure = (
        f"{share(signs.wasted_s, all_s)} of the slot time was for nothing: attempts that failed "
        f"{span(signs.failed_s)}, runs that went with their instance {span(signs.lost_s)}, work "
        f"done twice {span(signs.repeated_s)}."
    )
    if signs.wasted_s > max(WASTED * all_s, 1.0):
        yield Finding("wasted work", Level.ACT, "Work was done for nothing", figure, _mend(signs))
    else:
        yield good("wasted work", "Hardly any work was for nothing", figure)


def _mend(signs: Signs) -> str:
    most_s = max(signs.failed_s, signs.lost_s, signs.repeated_s)
    if most_s == signs.failed_s:
        return (
            "Mend what stands first under Failures. Where another attempt cannot help, name in "
            "`on` of the stage's `retry` what is worth one, or lower its `attempts`."
        )
    if most_s == signs.lost_s:
        return (
            "Less is lost with smaller bundles (`bundle` of the stage) or shorter tasks (`size` in "
            "the job file's `input`), and on fewer Spot instances (`--on-demand-percent` of "
            "`batchlab deploy apply`)."
        )
    return "A longer `visibility_s` in `settings.toml`, where workers are too busy to extend it in time."


def requests(signs: Signs) -> Iterator[Finding]:
    """Check whether requests cost more than the work."""
    if not signs.total:
        yield good("requests", "Requests cannot be judged", "No prices were put to the run.")
        return
    total = float(signs.total)
    figure = (
        f"Requests to SQS and S3 are {share(float(signs.requests), total)} of the bill, compute is "
        f"{share(float(signs.compute), total)}."
    )
    if signs.requests > signs.compute:
        yield Finding(
            "requests",
            Level.ACT,
            "Requests cost more than the work",
            figure,
            "A larger `bundle` of the stage, or tasks with more to do, ask less often.",
        )
    else:
        yield good("requests", "Requests cost less than the work", figure)


CHECKS: tuple[Check, ...] = (
    wasted,
    tiny,
    overhead,
    long_on_spot,
    too_long,
    crowding,
    idle_slots,
    lag,
    too_small,
    too_large,
    idle_cost,
    starved,
    tail,
    requests,
)
"""All checks. Findings of equal level keep this order."""


def findings(signs: Signs) -> tuple[Finding, ...]:
    """Return the findings of all checks, most important first. Each check returns at least one."""
    findings = [finding for check in CHECKS for finding in check(signs)]
    return tuple(sorted(findings, key=lambda one: -one.level))
