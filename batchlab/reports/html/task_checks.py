"""Checks of single stages: whether their tasks have the right size, and the room they need.

Invariant: each looks at every stage, and has a finding for each that is to be changed.

What a check of a run comes to.

Invariant: a finding names the figure it rests on, and what is to be changed the setting too.
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
"""What lasts less is not worth a word, however large its share of a short run is."""


class Level(IntEnum):
    """How much a finding matters: the higher, the sooner."""

    GOOD = 0
    NOTE = 1
    ACT = 2
    WRONG = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """`check` names the check; `figure` is what it rests on, `setting` what to change, with code
    between backticks. Of what is GOOD, `setting` is empty."""

    check: str
    level: Level
    title: str
    figure: str
    setting: str = ""


Check = Callable[[Signs], Iterator[Finding]]


def good(check: str, title: str, figure: str) -> Finding:
    return Finding(check, Level.GOOD, title, figure)


def name(text: str) -> str:
    """A stage's or a pool's name, as it may stand in a sentence."""
    return visible(text, 40).replace("`", "'")


def limits(pool: str, option: str) -> str:
    """The command that changes a pool's limits."""
    return f"`batchlab grid scale {name(pool) or 'POOL'} {option} N`"


def slots_of(pool: str) -> str:
    """The option that changes how many slots a pool's instances have."""
    return f"`--pool {name(pool) or 'NAME'}:MIN-MAXxSLOTS` of `batchlab grid up`"


TINY_SHARE = 0.5
OVERHEAD = 0.2
SLOWED = 1.3
TOLD = 3
"""Stages that a check without a finding tells of."""

FINER = "Cut the input finer (`size` in the job file's `input`)"


def tiny(signs: Signs) -> Iterator[Finding]:
    """Tasks of less than 100 ms: a message, a commit and a row for next to nothing."""
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
    """Time of bundles in which no task ran, where that is not for tiny tasks."""
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
    """Tasks of more than ten minutes on Spot instances, whose notice is two."""
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
    """Tasks of more than eleven hours: SQS hides a message for twelve at most."""
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
    """Tasks that are slower the more of them share an instance."""
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
