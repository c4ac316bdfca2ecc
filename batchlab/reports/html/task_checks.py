"""Checks of single stages: the size of their tasks and the resources that they need.

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
from batchlab.reports.html.text import share, visible

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
    hit = [one for one in signs.stages if one.bundles and one.tiny > TINY_SHARE * one.tasks]
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
        told = [f"{name(one.name)} {span(one.median_s)}" for one in signs.stages[:TOLD]]
        figure = f"Median run time: {', '.join(told)}." if told else "No task ran."
        yield good("task size", "No stage is made of tiny tasks", figure)


def _costly(stage: StageSigns) -> bool:
    return stage.overhead_s > OVERHEAD * stage.took_s


def overhead(signs: Signs) -> Iterator[Finding]:
    """Check how much of the bundles' time no task ran, for stages without tiny tasks."""
    hit = [
        one
        for one in signs.stages
        if _costly(one) and one.overhead_s > MATTERS_S and one.tiny <= TINY_SHARE * one.tasks
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
        took_s = sum(one.took_s for one in signs.stages)
        spent_s = sum(one.overhead_s for one in signs.stages)
        yield good(
            "overhead",
            "Bundles are mostly tasks",
            f"{share(spent_s, took_s)} of the slot time of bundles went to something else than "
            "tasks.",
        )


def long_on_spot(signs: Signs) -> Iterator[Finding]:
    """Check for tasks above 10 minutes on Spot instances, which get a notice of 2 minutes."""
    hit = [one for one in signs.stages if one.long_on_spot]
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
        longest_s = max((one.longest_on_spot_s for one in signs.stages), default=0.0)
        figure = f"The longest there took {span(longest_s)}." if longest_s else "None ran on Spot."
        yield good("long tasks on Spot", "No task was too long for Spot", figure)


def too_long(signs: Signs) -> Iterator[Finding]:
    """Check for tasks above 11 hours. SQS hides a message for at most 12 hours."""
    hit = [one for one in signs.stages if one.too_long]
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
        longest_s = max((one.longest_s for one in signs.stages), default=0.0)
        yield good(
            "task length", "No task took longer than 11 h", f"The longest took {span(longest_s)}."
        )


def crowding(signs: Signs) -> Iterator[Finding]:
    """Check for tasks that run slower when other tasks share their instance."""
    known = [
        (one, one.alone_s, one.crowded_s)
        for one in signs.stages
        if one.alone_s is not None and one.crowded_s is not None
    ]
    hit = [(one, alone, crowded) for one, alone, crowded in known if crowded > SLOWED * alone]
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
            f"{name(one.name)} {crowded / alone:.2f} times as long"
            for one, alone, crowded in known[:TOLD]
            if alone
        ]
        yield good(
            "shared slots",
            "Tasks do not slow each other down",
            f"With busy neighbours a task took: {', '.join(told)} as with idle ones."
            if told
            else "No stage had tasks both alone on an instance and beside others.",
        )
