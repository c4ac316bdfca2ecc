"""Checks of a run: the size of its tasks, the size and timing of its fleet, waste, and cost.

Invariants: each finding contains the figures on which it is based, and a problem also names the setting to change. A
check that does not find a problem reports the examined figures, so every page lists all checks. A check of stages
returns one finding for each stage with a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from batchlab.core import task_sizes
from batchlab.core.task_sizes import FINER, LONG_ON_SPOT_S, TINY_S, SizeProblem
from batchlab.core.text import count, span
from batchlab.reports.html.metrics import RunFigures, StageFigures
from batchlab.reports.html.source import share, visible

MIN_PROBLEM_S = 5.0
"""Minimum duration in seconds of a problem that the report shows. A problem that lasts less than MIN_PROBLEM_S is not
shown, even in a short run.
"""
MAX_TINY_SHARE = 0.5
MAX_OVERHEAD_SHARE = 0.2
MAX_SLOWDOWN = 1.3
MAX_NAMED_STAGES = 3
"""Maximum number of stages that a finding without a problem lists."""
MIN_FILLED_SHARE = 0.6
MAX_IDLE_SHARE, MAX_NOTED_IDLE_SHARE = 0.35, 0.6
MAX_UNUSED_SHARE = 0.25
MAX_STARVED_SHARE = 0.2
MAX_FULL_SHARE = 0.5
MAX_LAG_SHARE = 0.15
MAX_TAIL_SHARE = 0.25
MAX_WASTED_SHARE = 0.05


class Level(IntEnum):
    """Importance of a finding. Findings with a higher level come first."""

    GOOD = 0
    NOTE = 1
    ACT = 2
    WRONG = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of the check `check`, with the evidence in `figure`.

    `setting` describes what to change, with code between backticks. `setting` is empty if the level is GOOD.
    """

    check: str
    level: Level
    title: str
    figure: str
    setting: str = ""


Check = Callable[[RunFigures], Iterator[Finding]]


def _judge(
    check: str, is_problem: bool, *, good: str, title: str, figure: str, setting: str, level: Level = Level.NOTE
) -> Finding:
    """Return a finding with the problem and the setting to change. Without a problem, return a finding with the title
    `good`.
    """
    return Finding(check, level, title, figure, setting) if is_problem else Finding(check, Level.GOOD, good, figure)


def _name(text: str) -> str:
    """Return the name of a stage or pool, safe for use in a sentence."""
    return visible(text, 40).replace("`", "'")


def _limits(pool: str, option: str) -> str:
    """Return the command that changes a pool's limits."""
    return f"`batchlab grid scale {_name(pool) or 'POOL'} {option} N`"


def _slots_of(pool: str) -> str:
    """Return the option that changes the slots of a pool's instances."""
    return f"`--pool {_name(pool) or 'NAME'}:MIN-MAXxSLOTS` of `batchlab grid up`"


# --- Stages --------------------------------------------------------------------------------------


def tiny(run: RunFigures) -> Iterator[Finding]:
    """Check for stages with tasks shorter than 100 ms. Each task adds the cost of a message, a commit, and a row."""
    problems = [_tiny(stage) for stage in run.stages if stage.bundles and stage.tiny > MAX_TINY_SHARE * stage.tasks]
    medians = [f"{_name(stage.name)} {span(stage.median_s)}" for stage in run.stages[:MAX_NAMED_STAGES]]
    figure = f"Median run time of a task: {', '.join(medians)}." if medians else "No task ran."
    yield from problems or [Finding("task size", Level.GOOD, "No stage has many tiny tasks", figure)]


def _tiny(stage: StageFigures) -> Finding:
    return _size_finding(
        task_sizes.tiny(_name(stage.name), stage.median_s),
        Level.ACT if _has_overhead(stage) else Level.NOTE,
        f"Half of its {count(stage.tasks, 'task')} took at most {span(stage.median_s)}, and "
        f"{share(stage.tiny, stage.tasks)} took less than {span(TINY_S)}. A bundle had {stage.per_bundle:,.1f} tasks "
        f"on average. {share(stage.overhead_s, stage.took_s)} of the slot time of bundles was overhead.",
    )


def _size_finding(problem: SizeProblem, level: Level, figure: str) -> Finding:
    return Finding(problem.check, level, problem.title, figure, problem.setting)


def _has_overhead(stage: StageFigures) -> bool:
    return stage.overhead_s > MAX_OVERHEAD_SHARE * stage.took_s


def overhead(run: RunFigures) -> Iterator[Finding]:
    """Check which share of the bundles' time was not used by tasks. Stages with tiny tasks are skipped."""
    problems = [
        Finding(
            "overhead",
            Level.ACT,
            f"Bundles of {_name(stage.name)} take longer than their tasks",
            f"{share(stage.overhead_s, stage.took_s)} of their slot time was overhead: "
            f"{span(stage.overhead_s / max(1, stage.bundles))} per bundle to fetch inputs, start processes, and "
            "commit.",
            "Use smaller inputs and results, or import fewer modules when a handler starts. Or put more tasks into "
            "a bundle with `bundle` of the stage.",
        )
        for stage in run.stages
        if _has_overhead(stage) and stage.overhead_s > MIN_PROBLEM_S and stage.tiny <= MAX_TINY_SHARE * stage.tasks
    ]
    part = share(sum(stage.overhead_s for stage in run.stages), sum(stage.took_s for stage in run.stages))
    figure = f"{part} of the slot time of bundles was overhead."
    yield from problems or [Finding("overhead", Level.GOOD, "Bundles have little overhead", figure)]


def long_on_spot(run: RunFigures) -> Iterator[Finding]:
    """Check for tasks longer than 10 minutes on Spot Instances, because a Spot Instance gets a notice of 2 minutes."""
    problems = [
        _size_finding(
            task_sizes.long_on_spot(_name(stage.name)),
            Level.ACT,
            f"{count(stage.long_on_spot, 'task')} of more than {span(LONG_ON_SPOT_S)} ran on Spot instances, the "
            f"longest for {span(stage.longest_on_spot_s)}. If an instance is interrupted, its task starts again. "
            f"Ended instances lost {span(run.lost_s)} of slot time.",
        )
        for stage in run.stages
        if stage.long_on_spot
    ]
    longest_s = max((stage.longest_on_spot_s for stage in run.stages), default=0.0)
    figure = f"The longest task on Spot took {span(longest_s)}." if longest_s else "No task ran on Spot."
    yield from problems or [Finding("long tasks on Spot", Level.GOOD, "No task was too long for Spot", figure)]


def too_long(run: RunFigures) -> Iterator[Finding]:
    """Check for tasks longer than 11 hours, because SQS hides a message for at most 12 hours."""
    problems = [
        _size_finding(
            task_sizes.too_long(_name(stage.name)),
            Level.ACT,
            f"{count(stage.too_long, 'task')} took more than 11 h, the longest {span(stage.longest_s)}. After 12 h, "
            "a delayed message takes the place of a task's message. If the worker fails, half a day of work is lost.",
        )
        for stage in run.stages
        if stage.too_long
    ]
    longest_s = max((stage.longest_s for stage in run.stages), default=0.0)
    figure = f"The longest task took {span(longest_s)}."
    yield from problems or [Finding("task length", Level.GOOD, "No task took longer than 11 h", figure)]


def crowding(run: RunFigures) -> Iterator[Finding]:
    """Check for tasks that run slower when other tasks share their instance."""
    compared = [
        (stage, stage.alone_s, stage.crowded_s)
        for stage in run.stages
        if stage.alone_s is not None and stage.crowded_s is not None
    ]
    problems = [
        Finding(
            "shared slots",
            Level.ACT,
            f"Tasks of {_name(stage.name)} slow each other down",
            f"The mean run time of a task was {span(crowded_s)} while the other slots of its instance were busy, and "
            f"{span(alone_s)} while they were idle{f', {crowded_s / alone_s:.1f} times as long' if alone_s else ''}. "
            "The tasks need more cores, memory, or disk than the instance has.",
            f"Use fewer slots per instance ({_slots_of(stage.pool)}), set `slots` in the stage's `resources`, or use "
            "instances with more CPUs.",
        )
        for stage, alone_s, crowded_s in compared
        if crowded_s > MAX_SLOWDOWN * alone_s
    ]
    ratios = [
        f"{_name(stage.name)} {crowded_s / alone_s:.2f} times as long"
        for stage, alone_s, crowded_s in compared[:MAX_NAMED_STAGES]
        if alone_s
    ]
    figure = "No stage had tasks both alone on an instance and together with others."
    if ratios:
        figure = f"While the other slots were busy, a task took: {', '.join(ratios)} as while they were idle."
    yield from problems or [Finding("shared slots", Level.GOOD, "Tasks do not slow each other down", figure)]


# --- Fleet ---------------------------------------------------------------------------------------


def idle_slots(run: RunFigures) -> Iterator[Finding]:
    """Check whether busy instances use only a few of their slots."""
    if run.filled is None:
        figure = "Each instance has one slot or ran no task."
        yield Finding("idle slots", Level.GOOD, "No instance is half idle", figure)
        return
    yield _judge(
        "idle slots",
        run.filled < MIN_FILLED_SHARE and run.busy_s > MIN_PROBLEM_S,
        good="Busy instances use most of their slots",
        title="Busy instances have idle slots",
        figure=f"While an instance ran tasks of this job, {share(run.filled, 1)} of its {run.slots_each} slots were "
        "busy.",
        setting=f"Use smaller instances with fewer slots ({_slots_of(run.pool)}), or a longer `drain_target_s` in "
        "`settings.toml`, so that fewer instances have more work.",
    )


def lag(run: RunFigures) -> Iterator[Finding]:
    """Check how long tasks waited for instances to come into service."""
    wait_s = run.first_wait_s or 0.0
    boots = ""
    if run.boots and run.boot_s is not None:
        boots = (
            f" {count(run.boots, 'instance')} booted: half of them took at most {span(run.boot_s)}, and the slowest "
            f"took {span(run.longest_boot_s or 0.0)}."
        )
    yield _judge(
        "scaling lag",
        wait_s > max(MAX_LAG_SHARE * run.span_s, MIN_PROBLEM_S),
        level=Level.ACT,
        good="Instances were in service in time",
        title="Work waited for instances to boot",
        figure=f"The first task started {span(wait_s)} after it was ready, {share(wait_s, run.span_s)} of the run."
        f"{boots}",
        setting=f"Keep some instances running ({_limits(run.pool, '--min')}), or start them before a known peak "
        f"({_limits(run.pool, '--desired')}). A machine image with all software boots faster.",
    )


def too_small(run: RunFigures) -> Iterator[Finding]:
    """Check whether all slots were busy for most of the run while tasks waited."""
    is_problem = run.full_s > max(MAX_FULL_SHARE * run.span_s, MIN_PROBLEM_S)
    figure = (
        f"For {share(run.full_s, run.span_s)} of the run, nearly all slots were busy while tasks waited. At most "
        f"{run.peak_slots:,.0f} slots were in service."
    )
    if is_problem:
        figure += (
            f" Twice as many slots would have saved up to {span(run.full_s / 2)}, for about the same instance time."
        )
    yield _judge(
        "fleet too small",
        is_problem,
        good="The fleet was large enough",
        title="A larger fleet would have finished the job sooner",
        figure=figure,
        setting=f"Raise the maximum ({_limits(run.pool, '--max')}), or use a shorter `drain_target_s` in "
        "`settings.toml`.",
    )


def too_large(run: RunFigures) -> Iterator[Finding]:
    """Check whether the fleet had too much idle slot time."""
    idle_s = max(0.0, run.slot_s - run.busy_s)
    total = count(run.instances, run.noun)
    usage = f"{run.unused:,} of {total} ran no task." if run.unused else f"{total} ran some of its tasks."
    is_unused = run.unused > MAX_UNUSED_SHARE * run.instances
    yield _judge(
        "fleet too large",
        bool(run.slot_s and (is_unused or idle_s > max(MAX_IDLE_SHARE * run.slot_s, MIN_PROBLEM_S))),
        level=Level.ACT if is_unused or idle_s > MAX_NOTED_IDLE_SHARE * run.slot_s else Level.NOTE,
        good="The fleet was not too large",
        title="The fleet was larger than its work",
        figure=f"This job did not use {share(idle_s, run.slot_s)} of the slot time in service, {span(idle_s)}. {usage}",
        setting=f"Lower the maximum ({_limits(run.pool, '--max')}). Or set, in `settings.toml`, a longer "
        "`drain_target_s` to launch fewer instances, or a shorter `idle_s` to terminate them sooner.",
    )


def idle_cost(run: RunFigures) -> Iterator[Finding]:
    """Check whether idle instance time cost more than the work.

    Idle instance time includes the boot, the tail of the run, and seconds that are billed because of the minimum of 60
    s.
    """
    if not run.total:
        yield Finding("idle cost", Level.GOOD, "The cost of idle instances is unknown", "The run has no prices.")
        return
    total = float(run.total)
    yield _judge(
        "idle cost",
        run.idle > run.compute,
        good="Idle instances cost less than the work",
        title="Idle instances cost more than the work",
        figure=f"Idle instance time is {share(float(run.idle), total)} of the bill, and compute is "
        f"{share(float(run.compute), total)}. Idle time includes boots, waiting, the tail, and the billed minimum.",
        setting="AWS bills an instance from its launch, and for at least 60 s. For short jobs, use fewer instances "
        f"({_limits(run.pool, '--max')}). Or run several jobs on the same instances, with a longer `idle_s` in "
        "`settings.toml`.",
    )


def find_starved(run: RunFigures) -> Iterator[Finding]:
    """Check whether slots were idle while tasks were ready."""
    of_share = ""
    if run.share:
        of_share = (
            f" With a fair-share policy, a larger `--max-slots` or a lower `--weight` of `batchlab share set` gives "
            f"share {_name(run.share)} more slots."
        )
    yield _judge(
        "idle while work waits",
        run.starved_s > max(MAX_STARVED_SHARE * run.slot_s, MIN_PROBLEM_S),
        level=Level.ACT,
        good="Few slots were idle while tasks waited",
        title="Slots were idle while tasks waited",
        figure=f"{share(run.starved_s, run.slot_s)} of the slot time, {span(run.starved_s)}, was idle while tasks "
        "were ready.",
        setting="Use smaller bundles (`bundle` of the stage), which occupy more slots. Tasks with several `slots` "
        "leave some slots empty. Jobs with a higher `priority` get the slots of the pool first."
        f"{of_share}",
    )


def tail(run: RunFigures) -> Iterator[Finding]:
    """Check whether a few long tasks delayed the end of the run."""
    figure = (
        f"During the last {span(run.tail_s)}, {share(run.tail_s, run.span_s)} of the run, less than half of the peak "
        "number of slots were busy."
    )
    is_problem = bool(run.stages) and run.tail_s > max(MAX_TAIL_SHARE * run.span_s, MIN_PROBLEM_S)
    if is_problem:
        stage = max(run.stages, key=lambda stage: stage.longest_s)
        figure += (
            f" The longest task took {span(stage.longest_s)}. It is of {_name(stage.name)}, where half of the tasks "
            f"took at most {span(stage.median_s)}."
        )
    yield _judge(
        "long tail",
        is_problem,
        good="The run had no long tail",
        title="The run waited for its last tasks",
        figure=figure,
        setting=f"{FINER}, or put the large items first.",
    )


def find_wasted(run: RunFigures) -> Iterator[Finding]:
    """Check for wasted slot time, and for tasks with two results."""
    if run.harmful:
        yield Finding(
            "duplicates",
            Level.WRONG,
            "A task has two results",
            f"{count(run.harmful, 'task')} got a second committed result, which must never happen.",
            "Report this as a bug, and attach this page. `batchlab grid rebuild-ledger` counts the results in the "
            "bucket again.",
        )
    total_s = run.busy_s + run.lost_s + run.repeated_s
    yield _judge(
        "wasted work",
        run.wasted_s > max(MAX_WASTED_SHARE * total_s, 1.0),
        level=Level.ACT,
        good="Little work was wasted",
        title="Work was wasted",
        figure=f"{share(run.wasted_s, total_s)} of the slot time was wasted: {span(run.failed_s)} by failed attempts, "
        f"{span(run.lost_s)} by runs that ended with their instance, and {span(run.repeated_s)} by repeated work.",
        setting=_waste_setting(run),
    )


def _waste_setting(run: RunFigures) -> str:
    largest_s = max(run.failed_s, run.lost_s, run.repeated_s)
    if largest_s == run.failed_s:
        return (
            "Fix the first cause under Failures. If a retry cannot help, list in `on` of the stage's `retry` only the "
            "errors that are worth a retry, or use fewer `attempts`."
        )
    if largest_s == run.lost_s:
        return (
            "Less work is lost with smaller bundles (`bundle` of the stage), with shorter tasks (`size` in the job "
            "file's `input`), and with fewer Spot instances (`--on-demand-percent` of `batchlab deploy apply`)."
        )
    if run.copies > 2 * run.copies_won:
        return (
            "Most speculative copies lost, so the tasks take long because of their input. Set `speculative_copies: "
            "false` in the stage, or use shorter tasks."
        )
    return (
        "If workers are too busy to extend visibility timeouts in time, use a longer `visibility_s` in `settings.toml`."
    )


def requests(run: RunFigures) -> Iterator[Finding]:
    """Check whether the requests to S3 and SQS cost more than the work."""
    if not run.total:
        yield Finding("requests", Level.GOOD, "The cost of requests is unknown", "The run has no prices.")
        return
    total = float(run.total)
    yield _judge(
        "requests",
        run.requests > run.compute,
        level=Level.ACT,
        good="Requests cost less than the work",
        title="Requests cost more than the work",
        figure=f"Requests to SQS and S3 are {share(float(run.requests), total)} of the bill, and compute is "
        f"{share(float(run.compute), total)}.",
        setting="A larger `bundle` of the stage, or tasks with more work, need fewer requests.",
    )


CHECKS: tuple[Check, ...] = (
    *(find_wasted, tiny, overhead, long_on_spot, too_long, crowding, idle_slots, lag, too_small, too_large, idle_cost),
    *(find_starved, tail, requests),
)
"""All checks. Findings with equal levels are in the order of the checks."""


def findings(run: RunFigures) -> tuple[Finding, ...]:
    """Return the findings of all checks, with the most important finding first. Each check has at least one finding."""
    findings = [finding for check in CHECKS for finding in check(run)]
    return tuple(sorted(findings, key=lambda finding: -finding.level))
