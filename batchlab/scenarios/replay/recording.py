"""Recording of past jobs as a scenario: a trace of arrivals, measured task times, and the pools.

The recording scales the measured task times, so that the total time drawn with the seed of the scenario file equals the
measured total.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from batchlab.core import instance_types
from batchlab.core.api_types import JobView
from batchlab.core.errors import UsageError
from batchlab.core.fair_share import SharePolicy
from batchlab.core.job_definition import Condition, JobDef
from batchlab.core.model import JobId, Market, Pool, TaskSet
from batchlab.core.retry_rule import RetryRule
from batchlab.scenarios.model import expansion, loader
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import TENANT_TAG, PoolPlan
from batchlab.scenarios.record import JobRun, Record, StageRun
from batchlab.scenarios.replay.measurements import Measurements, root_tasks

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class RecordedArrival:
    """Past job, with its arrival in seconds after the first job and its number of root tasks."""

    due_s: float
    template: str
    tasks: int
    tenant: str = ""
    label: str = ""


@dataclass(slots=True)
class RecordedTemplate:
    """Common properties of the jobs of one template. `jobs` is the number of jobs of the template."""

    stages: list[StageRun]
    jobs: int
    deadline_s: float | None = None
    share: str = ""
    priority: int = 0
    max_failures: int = 0
    after: set[tuple[str, Condition]] = field(default_factory=set)
    """Templates on whose jobs each job of the template depends."""
    definition: JobDef | None = None
    """Definition of a job of the template, which has values that a record lacks."""


@dataclass(slots=True)
class RecordedWorkload:
    """Past workload. The times of the workload were compressed by the factor `compressed`."""

    name: str
    about: str
    arrived: list[RecordedArrival]
    templates: dict[str, RecordedTemplate]
    pools: list[PoolPlan]
    policy: Mapping[str, float] = field(default_factory=dict)
    compressed: float = 1.0
    seed: int = 1
    shares: SharePolicy | None = None
    left_out: int = 0
    """Number of skipped jobs that had too little information."""


@dataclass(frozen=True, slots=True)
class WrittenScenario:
    """Files of a recorded scenario that were written, with their content."""

    scenario: Path
    trace: Path
    jobs: int
    tasks: int
    task_s: float
    left_out: int = 0
    """Number of jobs that were skipped because of too little information."""


def from_record(record: Record, name: str) -> RecordedWorkload:
    """Convert the record of a run to a workload. Raise UsageError if no job has enough information."""
    stages: dict[str, list[StageRun]] = defaultdict(list)
    for stage in record.stages:
        stages[stage.template].append(stage)
    jobs = sorted((job for job in record.jobs if job.template in stages and job.tasks), key=lambda job: job.submitted_s)
    if not jobs:
        raise UsageError(
            f"The record of {record.scenario} does not have a job with a known number of tasks.",
            remedy="Name the record of a replay that has come to its end.",
        )
    runs: dict[str, list[JobRun]] = defaultdict(list)
    for job in jobs:
        runs[job.template].append(job)
    begun_s = jobs[0].submitted_s
    templates = {}
    for template in dict.fromkeys(job.template for job in record.jobs if job.template in runs):
        deadlines = [job.deadline_s - job.due_s for job in runs[template] if job.deadline_s is not None]
        templates[template] = RecordedTemplate(
            stages[template], len(runs[template]), max(deadlines, default=None), share=runs[template][0].share
        )
    return RecordedWorkload(
        name,
        f"The scenario {record.scenario}, as measured on {record.backend}.",
        [
            RecordedArrival(job.submitted_s - begun_s, job.template, job.tasks or 0, job.tenant, job.label)
            for job in jobs
        ],
        templates,
        _pools(record),
        record.settings,
        record.compressed,
        record.seed,
        shares=record.shares,
        left_out=len(record.jobs) - len(jobs),
    )


def _pools(record: Record) -> list[PoolPlan]:
    plans = []
    known_types = instance_types.load().types
    for name, (least, most, slots) in record.pools.items():
        lives = [life for life in record.instances if life.pool == name]
        boots = [life.boot_s for life in lives if life.boot_s is not None]
        spot = sum(life.market == Market.SPOT for life in lives) / max(1, len(lives))
        types = [life.type for life in lives if life.type in known_types]
        kind = max(types, key=types.count) if types else ""
        boot_s = median(boots) if boots else 0.0
        plans.append(
            PoolPlan(Pool(name, least, most, slots, boot_s, instance_type=kind, gpus=record.gpus.get(name, 0)), spot)
        )
    return plans


def from_jobs(
    jobs: Sequence[tuple[JobView, JobDef]],
    measured: Mapping[str, Measurements],
    name: str,
    pools: Sequence[PoolPlan],
    policy: Mapping[str, float],
    shares: SharePolicy | None = None,
) -> RecordedWorkload:
    """Convert ended jobs, with their measurements by job id, to a workload.

    Jobs of the same name, share, and stages form one template. The template depends on another template if each of its
    jobs depended on a job of this template.
    """
    ordered = sorted(jobs, key=lambda pair: pair[0]["submitted_s"])
    ids = [view["id"] for view, _ in ordered]
    begun_s = ordered[0][0]["submitted_s"]
    names: dict[tuple[str, object], str] = {}
    templates: dict[str, RecordedTemplate] = {}
    stages: dict[str, Measurements] = {}
    arrivals = []
    template_of: dict[JobId, str] = {}
    for view, job in ordered:
        kind = (job.name, (job.share, *((s.name, s.after, s.gather, s.pool, s.slots, s.gpus) for s in job.stages)))
        if kind not in names:
            others = sum(other == job.name for other, _ in names)
            names[kind] = f"{job.name[:37]}-{others + 1}" if others else job.name
        template = names[kind]
        max_failures = 0 if job.max_failures_percent else int(job.max_failures)
        recorded = templates.setdefault(
            template,
            RecordedTemplate([], 0, share=job.share, priority=job.priority, max_failures=max_failures, definition=job),
        )
        after = {(template_of.get(other.job, template), other.condition) for other in job.after}
        after = {pair for pair in after if pair[0] != template}
        recorded.after = recorded.after & after if recorded.jobs else after
        template_of[job.id] = template
        recorded.jobs += 1
        stages.setdefault(template, Measurements()).add(measured[view["id"]])
        tasks = root_tasks(view, {str(stage.name): tuple(stage.after) for stage in job.stages})
        tenant = dict(job.tags).get(TENANT_TAG, "")
        arrivals.append(RecordedArrival(view["submitted_s"] - begun_s, template, tasks, tenant, view["id"]))
    for template, measurements in stages.items():
        templates[template].stages = list(measurements.runs())
    about = f"The job {ids[0]}" if len(ids) == 1 else f"{len(ids)} jobs from {ids[0]} to {ids[-1]}"
    return RecordedWorkload(name, f"{about}, recorded.", arrivals, templates, list(pools), policy, shares=shares)


def write(workload: RecordedWorkload, path: Path) -> WrittenScenario:
    """Write the workload as a scenario to `path`, and its trace to a JSON Lines file with the same name.

    Raise UsageError if a file cannot be written, if a file with the trace's name exists, or if the scenario is invalid.
    """
    trace = path.with_suffix(".jsonl")
    if trace == path:
        raise UsageError(
            f"{path} cannot be both the scenario and its trace.",
            remedy=f"Name a YAML file, such as {path.with_suffix('.yaml')}.",
        )
    if trace.exists() and trace.name not in _traces(path):
        raise UsageError(
            f"The trace would replace the existing file {trace} next to the scenario.",
            remedy="Name another file with --out.",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trace.write_text("".join(f"{_line(arrival, workload.compressed)}\n" for arrival in workload.arrived))
        path.write_text(_text(workload, trace, {}))
        path.write_text(_text(workload, trace, _scale_factors(workload, path)))
    except OSError as error:
        raise UsageError(
            f"The scenario {path} cannot be written: {error.strerror}.", remedy="Name another file with --out."
        ) from error
    tasks, task_s = 0, 0.0
    for count, seconds in drawn_times(path).values():
        tasks, task_s = tasks + count, task_s + seconds
    return WrittenScenario(path, trace, len(workload.arrived), tasks, task_s, workload.left_out)


def _traces(path: Path) -> set[str]:
    try:
        arrivals = yaml.safe_load(path.read_text())["arrivals"]
        return {str(arrival["trace"]["file"]) for arrival in arrivals if "trace" in arrival}
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return set()


def drawn_times(path: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """Return the number of tasks and the total task seconds by template and stage, drawn with the seed of the scenario
    file.
    """
    scenario = loader.load(path)
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    for job in expand(scenario).jobs:
        counts = expansion.stage_sizes(job.template, job.tasks)
        for stage in job.template.stages:
            count = counts[stage.name]
            seconds = sum(expansion.task_times_s(scenario.seed, job, stage, TaskSet.span(0, count)))
            before = totals.get((job.template.name, stage.name), (0, 0.0))
            totals[job.template.name, stage.name] = before[0] + count, before[1] + seconds
    return totals


def _scale_factors(workload: RecordedWorkload, path: Path) -> dict[tuple[str, str], float]:
    """Return a factor for each stage with which the sum of the stage's task times equals the measured total.

    A failed task counts with the mean time of the succeeded tasks.
    """
    factors = {}
    for (template, name), (count, seconds) in drawn_times(path).items():
        stage = next(run for run in workload.templates[template].stages if run.stage == name)
        if stage.tasks and seconds:
            factors[template, name] = stage.run_s * workload.compressed / stage.tasks * count / seconds
    return factors


def _line(arrival: RecordedArrival, compressed: float) -> str:
    fields = {**asdict(arrival), "due_s": round(arrival.due_s * compressed, _DIGITS)}
    return json.dumps({name: value for name, value in fields.items() if value != ""})


_HEAD = (
    "# Made by `batchlab scenario record`. Task times are measured times, scaled so that with this seed\n"
    "# their sum equals the measured total.\n"
)


def _text(workload: RecordedWorkload, trace: Path, factors: Mapping[tuple[str, str], float]) -> str:
    compressed = workload.compressed
    doc: dict[str, Any] = {"name": workload.name, "about": workload.about, "seed": workload.seed}
    if compressed > 1:
        doc["compress"] = compressed
    doc["jobs"] = {name: _job(name, template, compressed, factors) for name, template in workload.templates.items()}
    doc["arrivals"] = [{"trace": {"file": trace.name, "format": "jsonl"}}]
    used = {stage.pool for template in workload.templates.values() for stage in template.stages}
    plans = (plan for plan in workload.pools if plan.pool.max_size or plan.pool.name in used)
    doc["pools"] = {plan.pool.name: _pool(plan, compressed) for plan in plans}
    policy = {
        key: round(workload.policy[f"{key}_s"] * compressed, _DIGITS)
        for key in ("drain_target", "cooldown_in", "idle")
        if f"{key}_s" in workload.policy
    }
    if policy:
        doc["policy"] = policy
    if (shares := workload.shares) is not None:
        entries = [{key: value for key, value in asdict(entry).items() if value is not None} for entry in shares.shares]
        decay_s = round(shares.decay_s * compressed, _DIGITS)
        doc["shares"] = {"decay": decay_s, "reservation": shares.reservation, "shares": entries}
    doc["expect"] = {"lost": 0, "duplicates": 0}
    return _HEAD + yaml.dump(doc, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=90)


class _FlowList(list[float]):
    """List that the YAML dumper writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _FlowList, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _pool(plan: PoolPlan, compressed: float) -> dict[str, Any]:
    pool = plan.pool
    # `max` is at least 1, because a pool whose maximum size was reduced to 0 had an instance before the reduction.
    doc: dict[str, Any] = {"min": pool.min_size, "max": max(1, pool.max_size), "slots": pool.slots}
    rest = {
        "boot": round(pool.boot_s * compressed, 3),
        "instance_type": pool.instance_type,
        "spot": round(plan.spot, 3),
    }
    doc |= {key: value for key, value in rest.items() if value}
    # Without the key, a pool has the GPUs of its instance type.
    if pool.gpus or (pool.instance_type and instance_types.load().gpus([pool.instance_type])):
        doc["gpus"] = pool.gpus
    return doc


def _job(
    name: str, template: RecordedTemplate, compressed: float, factors: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    if template.deadline_s is not None:
        doc["deadline"] = round(template.deadline_s * compressed, _DIGITS)
    if template.share:
        doc["share"] = template.share
    if template.priority:
        doc["priority"] = template.priority
    if template.max_failures:
        doc["max_failures"] = template.max_failures
    if template.after:
        # If the template depends on another template in both ways, `succeeded` includes `ended`.
        conditions = dict(sorted(template.after))
        doc["after"] = [name if how is Condition.SUCCEEDED else f"{name}:{how}" for name, how in conditions.items()]
    doc["stages"] = [
        _stage(stage, template, compressed * factors.get((name, stage.stage), 1.0)) for stage in template.stages
    ]
    return doc


def _stage(stage: StageRun, template: RecordedTemplate, factor: float) -> dict[str, Any]:
    task_s: Sequence[float] = stage.task_s or (0.0,)
    shown = [round(seconds * factor, _DIGITS) for seconds in task_s]
    doc: dict[str, Any] = {"name": stage.stage}
    doc["task"] = shown[0] if len(set(shown)) == 1 else {"empirical": _FlowList(shown)}
    doc["after"] = list(stage.after)
    if stage.gather == "*":
        doc["gather"] = "all"
    elif stage.gather:
        doc["gather"] = {"by": "key", "groups": max(1, round(stage.tasks / template.jobs))}
    doc |= {"slots": stage.slots, "pool": stage.pool}
    if stage.gpus:
        doc["gpus"] = stage.gpus
    if template.definition:
        own = template.definition.stage(stage.stage)
        if own.bundle:
            doc["bundle"] = own.bundle
        if own.memory_bytes:
            doc["memory"] = own.memory_bytes
        if own.retry.attempts != RetryRule().attempts:
            doc["retry"] = own.retry.attempts
    return doc
