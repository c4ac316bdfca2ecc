"""Recording of past jobs as a scenario: a trace of arrivals, measured task times, and the pools.

With the file's own seed, the total task time equals the measured total: measured times are scaled,
because sampling alone would change the sum.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from batchlab.core import instance_types
from batchlab.core.api_types import JobView
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Market, Pool, TaskSet
from batchlab.core.retry_rule import RetryRule
from batchlab.scenarios.model import expansion, loader
from batchlab.scenarios.model.expansion import expand
from batchlab.scenarios.model.values import TENANT_TAG, PoolPlan
from batchlab.scenarios.record import JobRun, Record, StageRun
from batchlab.scenarios.replay.measurements import Measurements, root_tasks

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class RecordedArrival:
    """Past job: its arrival in seconds after the first one, and its number of root tasks."""

    due_s: float
    template: str
    tasks: int
    tenant: str = ""
    label: str = ""


@dataclass(slots=True)
class RecordedTemplate:
    """Common properties of the jobs of one template. `jobs` is their number."""

    stages: list[StageRun]
    jobs: int
    deadline_s: float | None = None
    priority: int = 0
    max_failures: int = 0
    definition: JobDef | None = None
    """Job definition, for values that a record lacks."""


@dataclass(slots=True)
class RecordedWorkload:
    """Past workload. Its times were compressed by `compressed`."""

    name: str
    about: str
    arrived: list[RecordedArrival]
    templates: dict[str, RecordedTemplate]
    pools: list[PoolPlan]
    policy: Mapping[str, float] = field(default_factory=dict)
    compressed: float = 1.0
    seed: int = 1
    left_out: int = 0
    """Number of jobs with too little information."""


@dataclass(frozen=True, slots=True)
class WrittenScenario:
    """Written files and their content."""

    scenario: Path
    trace: Path
    jobs: int
    tasks: int
    task_s: float
    left_out: int = 0
    """Number of jobs left out because of too little information."""


def from_record(record: Record, name: str) -> RecordedWorkload:
    """Convert a record. Raise UsageError if no job has enough information."""
    stages: dict[str, list[StageRun]] = defaultdict(list)
    for stage in record.stages:
        stages[stage.template].append(stage)
    jobs = [job for job in record.jobs if job.template in stages and job.tasks]
    if not jobs:
        raise UsageError(
            f"The record of {record.scenario} has no job with a known number of tasks.",
            remedy="Name the record of a replay that has come to its end.",
        )
    begun_s = min(job.submitted_s for job in jobs)
    counts: dict[str, list[JobRun]] = defaultdict(list)
    for job in jobs:
        counts[job.template].append(job)
    return RecordedWorkload(
        name,
        f"What the scenario {record.scenario} came to on {record.backend}, measured.",
        [
            RecordedArrival(job.submitted_s - begun_s, job.template, job.tasks or 0, job.tenant, job.label)
            for job in sorted(jobs, key=lambda one: one.submitted_s)
        ],
        {
            name: RecordedTemplate(stages[name], len(job_runs), _deadline_s(job_runs))
            for name, job_runs in counts.items()
        },
        _pools(record),
        record.settings,
        record.compressed,
        record.seed,
        len(record.jobs) - len(jobs),
    )


def _deadline_s(jobs: Iterable[JobRun]) -> float | None:
    found = [job.deadline_s - job.due_s for job in jobs if job.deadline_s is not None]
    return max(found, default=None)


def _pools(record: Record) -> list[PoolPlan]:
    found = []
    known = instance_types.load().types
    for name, (least, most, slots) in record.pools.items():
        instance_runs = [instance for instance in record.instances if instance.pool == name]
        boots = [instance_run.boot_s for instance_run in instance_runs if instance_run.boot_s is not None]
        spot = sum(instance_run.market == Market.SPOT for instance_run in instance_runs) / max(1, len(instance_runs))
        kinds = [instance_run.type for instance_run in instance_runs if instance_run.type in known]
        kind = max(kinds, key=kinds.count) if kinds else ""
        boot_s = median(boots) if boots else 0.0
        found.append(PoolPlan(Pool(name, least, most, slots, boot_s, instance_type=kind), spot))
    return found


def from_jobs(
    jobs: Sequence[tuple[JobView, JobDef]],
    measured: Mapping[str, Measurements],
    name: str,
    pools: Sequence[PoolPlan],
    policy: Mapping[str, float],
) -> RecordedWorkload:
    """Convert ended jobs with their measurements by job id.

    Jobs of the same name and stages form one template.
    """
    ordered = sorted(jobs, key=lambda one: one[0]["submitted_s"])
    begun_s = ordered[0][0]["submitted_s"]
    known: dict[tuple[str, object], str] = {}
    templates: dict[str, RecordedTemplate] = {}
    stages: dict[str, Measurements] = {}
    arrived = []
    for view, job in ordered:
        same = (job.name, tuple((s.name, s.after, s.gather, s.pool, s.slots) for s in job.stages))
        if same not in known:
            others = sum(named == job.name for named, _ in known)
            known[same] = f"{job.name[:37]}-{others + 1}" if others else job.name
        template = known[same]
        one = templates.setdefault(
            template, RecordedTemplate([], 0, priority=job.priority, max_failures=_allowed(job), definition=job)
        )
        one.jobs += 1
        stages.setdefault(template, Measurements()).add(measured[view["id"]])
        after = {str(stage.name): tuple(stage.after) for stage in job.stages}
        tasks = root_tasks(view, after)
        tenant = dict(job.tags).get(TENANT_TAG, "")
        arrived.append(RecordedArrival(view["submitted_s"] - begun_s, template, tasks, tenant, view["id"]))
    for template, measurements in stages.items():
        templates[template].stages = list(measurements.runs())
    return RecordedWorkload(name, f"{_describe_jobs(ordered)}, recorded.", arrived, templates, list(pools), policy)


def _allowed(job: JobDef) -> int:
    return 0 if job.max_failures_percent else int(job.max_failures)


def _describe_jobs(jobs: Sequence[tuple[JobView, JobDef]]) -> str:
    ids = [view["id"] for view, _ in jobs]
    return f"The job {ids[0]}" if len(ids) == 1 else f"{len(ids)} jobs from {ids[0]} to {ids[-1]}"


def write(past: RecordedWorkload, path: Path) -> WrittenScenario:
    """Write the scenario to `path`, and its trace beside it as JSON Lines.

    Raise UsageError for an unwritable file, an existing file with the trace's name, or an invalid
    scenario.
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
        lines = (json.dumps(_line(recorded_arrival, past.compressed)) for recorded_arrival in past.arrived)
        trace.write_text("".join(f"{line}\n" for line in lines))
        path.write_text(_text(past, trace, {}))
        path.write_text(_text(past, trace, _scale_factors(past, path)))
    except OSError as error:
        raise UsageError(
            f"The scenario {path} cannot be written: {error.strerror}.", remedy="Name another file with --out."
        ) from error
    tasks, task_s = 0, 0.0
    for count, seconds in drawn_times(path).values():
        tasks, task_s = tasks + count, task_s + seconds
    return WrittenScenario(path, trace, len(past.arrived), tasks, task_s, past.left_out)


def _traces(path: Path) -> set[str]:
    """Return the trace files of the existing scenario."""
    try:
        doc = yaml.safe_load(path.read_text())
        return {str(one["trace"]["file"]) for one in doc["arrivals"] if "trace" in one}
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return set()


def drawn_times(path: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """Return the number of tasks and their total seconds by template and stage, as drawn with the
    file's own seed.
    """
    scenario = loader.load(path)
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for job in expand(scenario).jobs:
        counts = expansion.stage_sizes(job.template, job.tasks)
        for stage in job.template.stages:
            count = counts[stage.name]
            seconds = sum(expansion.task_times_s(scenario.seed, job, stage, TaskSet.span(0, count)))
            before = found.get((job.template.name, stage.name), (0, 0.0))
            found[job.template.name, stage.name] = before[0] + count, before[1] + seconds
    return found


def _scale_factors(past: RecordedWorkload, path: Path) -> dict[tuple[str, str], float]:
    """Return the factor for each stage's times so that they sum to the measured total.

    Failed tasks count with the mean time of the others.
    """
    found = {}
    for (template, name), (count, seconds) in drawn_times(path).items():
        stage = next(stage_run for stage_run in past.templates[template].stages if stage_run.stage == name)
        if stage.tasks and seconds:
            mean_s = stage.run_s * past.compressed / stage.tasks
            found[template, name] = mean_s * count / seconds
    return found


def _line(one: RecordedArrival, compressed: float) -> dict[str, Any]:
    fields = {**asdict(one), "due_s": round(one.due_s * compressed, _DIGITS)}
    return {name: value for name, value in fields.items() if value != ""}


_HEAD = """\
# Made by `batchlab scenario record`. Task times are those that were measured, scaled so that with
# this seed they add up to what all of them took.
"""


def _text(past: RecordedWorkload, trace: Path, factors: Mapping[tuple[str, str], float]) -> str:
    doc: dict[str, Any] = {"name": past.name, "about": past.about, "seed": past.seed}
    if past.compressed > 1:
        doc["compress"] = past.compressed
    doc["jobs"] = {
        name: _job(name, recorded_template, past.compressed, factors)
        for name, recorded_template in past.templates.items()
    }
    doc["arrivals"] = [{"trace": {"file": trace.name, "format": "jsonl"}}]
    used = {stage.pool for template in past.templates.values() for stage in template.stages}
    doc["pools"] = {
        plan.pool.name: _pool(plan, past.compressed)
        for plan in past.pools
        if plan.pool.max_size or plan.pool.name in used
    }
    policy = {
        key: round(past.policy[f"{key}_s"] * past.compressed, _DIGITS)
        for key in ("drain_target", "cooldown_in", "idle")
        if f"{key}_s" in past.policy
    }
    if policy:
        doc["policy"] = policy
    doc["expect"] = {"lost": 0, "duplicates": 0}
    return _HEAD + yaml.dump(doc, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=90)


class _FlowList(list[float]):
    """List that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _FlowList, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def _pool(plan: PoolPlan, compressed: float) -> dict[str, Any]:
    pool = plan.pool
    # A pool that was reduced to 0 had an instance before.
    most = max(1, pool.max_size)
    doc: dict[str, Any] = {"min": pool.min_size, "max": most, "slots": pool.slots}
    if pool.boot_s:
        doc["boot"] = round(pool.boot_s * compressed, 3)
    if pool.instance_type:
        doc["instance_type"] = pool.instance_type
    if plan.spot:
        doc["spot"] = round(plan.spot, 3)
    return doc


def _job(
    name: str, one: RecordedTemplate, compressed: float, factors: Mapping[tuple[str, str], float]
) -> dict[str, Any]:
    doc: dict[str, Any] = {}
    if one.deadline_s is not None:
        doc["deadline"] = round(one.deadline_s * compressed, _DIGITS)
    if one.priority:
        doc["priority"] = one.priority
    if one.max_failures:
        doc["max_failures"] = one.max_failures
    doc["stages"] = [_stage(stage, one, compressed * factors.get((name, stage.stage), 1.0)) for stage in one.stages]
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
    if template.definition:
        own = template.definition.stage(stage.stage)
        if own.bundle:
            doc["bundle"] = own.bundle
        if own.memory_bytes:
            doc["memory"] = own.memory_bytes
        if own.retry.attempts != RetryRule().attempts:
            doc["retry"] = own.retry.attempts
    return doc
