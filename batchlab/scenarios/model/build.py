"""Conversion of a scenario file's Pydantic models to the values of values.py.

Each mistake in the file becomes a Problem with its location. A placeholder replaces each invalid value, so one check of
the file finds all mistakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.errors import BatchlabError, UsageError
from batchlab.core.fair_share import ShareAttributes, SharePolicy
from batchlab.core.job_definition import Dependency
from batchlab.core.pricing import price_book
from batchlab.jobs import field_types, handler_lookup, job_file
from batchlab.jobs.schema import GatherSpec
from batchlab.jobs.schema import JobSpec as JobFileSpec
from batchlab.jobs.schema import StageSpec as JobFileStage
from batchlab.jobs.validation import Structure
from batchlab.jobs.yaml_source import Loc, Problem, suggest
from batchlab.scenarios.model import arrivals, distributions, schema_distributions
from batchlab.scenarios.model.schema import (
    SOURCES,
    ArrivalSpec,
    ColumnsSpec,
    FaultSpec,
    GroupsSpec,
    JobSpec,
    ScenarioSpec,
    SharesSpec,
    StageSpec,
    TraceSpec,
)
from batchlab.scenarios.model.schema_distributions import One
from batchlab.scenarios.model.values import (
    Distribution,
    Expectation,
    Fault,
    FaultName,
    JobTemplate,
    Source,
    StageTemplate,
    WorkKind,
)
from batchlab.scenarios.traces.rows import RECORD_COLUMNS, SWF_COLUMNS, Columns, ColumnSum
from batchlab.scenarios.traces.source import Trace, TraceFormat
from batchlab.scenarios.verdicts import MEASURES, Unit

T = TypeVar("T")
ONE_STAGE = "work"
"""Name of the single stage of a job template that has only a task time."""


@dataclass(slots=True)
class ScenarioBuilder:
    """Builder of the values of one scenario file. Paths in the scenario file are relative to `folder`."""

    structure: Structure[ScenarioSpec]
    folder: Path
    problems: list[Problem] = field(default_factory=list)
    jobs: float = 0.0
    """Minimum number of jobs from the sources that were built so far."""

    def report(self, loc: Loc, message: str, remedy: str, *, at_key: bool = False) -> None:
        """Report a mistake, unless a mistake is already reported for the same location."""
        if self.structure.sound(loc):
            self.problems.append(Problem(loc, message, remedy, at_key))

    def build(self, loc: Loc, make: Callable[[], T], placeholder: T, remedy: str) -> T:
        """Return the result of `make`.

        If `make` raises an error, report the error at `loc` and return the placeholder.
        """
        if not self.structure.sound(loc):
            return placeholder
        try:
            return make()
        except (ValueError, OverflowError) as error:
            self.report(loc, f"This cannot be: {error}.", remedy)
            return placeholder

    def distribution(self, spec: One[Any], loc: Loc) -> Distribution:
        placeholder: Distribution = distributions.Constant(1.0)
        kinds = [key for key in _DISTRIBUTION_KINDS if getattr(spec, key, None) is not None]
        if len(kinds) != 1:
            what = "no distribution" if not kinds else f"more than one: {', '.join(kinds)}"
            remedy = "Write a number, or for example {lognormal: {median: 4, sigma: 0.8}}."
            self.report(loc, f"There must be one distribution, but there is {what}.", remedy)
            return placeholder
        kind = kinds[0]
        value = getattr(spec, kind)
        if kind == "constant":
            return distributions.Constant(value)
        if kind == "mixture":
            parts = tuple((part.weight, self.distribution(part, (*loc, kind, i))) for i, part in enumerate(value))
            return self.build((*loc, kind), lambda: distributions.Mixture(parts), placeholder, "Change it.")
        if kind == "empirical":
            return distributions.Empirical(tuple(value))

        def make() -> Distribution:
            distribution = _DISTRIBUTIONS[kind](**value.model_dump())
            if not distribution.mean <= field_types.MAX_TASKS:
                raise ValueError("its mean is too large")
            return distribution

        return self.build((*loc, kind), make, placeholder, "Change its numbers.")

    def job(self, name: str, spec: JobSpec) -> JobTemplate:
        loc: Loc = ("jobs", name)
        stages: tuple[StageTemplate, ...] = ()
        share = spec.share
        file: Path | None = None
        if spec.file is not None:
            file = self.path(spec.file, (*loc, "file"))
            work = None if file is None else self._job_file(file, loc)
            if work is not None:
                stages, share = self._stages_of(work.stages, spec, loc), share or work.share
        elif spec.stages is not None:
            at = (*loc, "stages")
            for check in (field_types.unique_names, field_types.order, field_types.gathers):
                if self.structure.sound(at):
                    self.problems += check(spec.stages, at)
            stages = tuple(self._stage(spec.stages, i, (*at, i)) for i in range(len(spec.stages)))
        elif spec.task is not None:
            task_s = self.distribution(spec.task, (*loc, "task"))
            stages = (StageTemplate(ONE_STAGE, task_s, speculative_copies=spec.speculative_copies),)
        else:
            remedy = "Write task: 4s, or stages:, or file:."
            self.report(loc, f"Job '{name}' does not say what its work is.", remedy, at_key=True)
        if spec.groups and spec.file is None:
            remedy = "Delete it; a stage's own gather says how many groups there are."
            self.report((*loc, "groups"), "'groups' means nothing without a job file.", remedy, at_key=True)
        if spec.stages is not None and (spec.task is not None or spec.file is not None):
            other = "file" if spec.file is not None else "task"
            self.report(
                (*loc, other), f"Job '{name}' has both stages and {other}.", "Delete one of the two.", at_key=True
            )
        return JobTemplate(
            name=name,
            stages=stages,
            tasks=distributions.Constant(1.0) if spec.tasks is None else self.distribution(spec.tasks, (*loc, "tasks")),
            tenant=spec.tenant,
            share=share or "",
            priority=spec.priority,
            deadline_s=spec.deadline,
            max_failures=spec.max_failures,
            file=file,
            after=tuple(self._dependencies(spec, (*loc, "after"))),
        )

    def _dependencies(self, spec: JobSpec, loc: Loc) -> Iterator[Dependency]:
        for i, text in enumerate(spec.after):
            try:
                yield Dependency.parse(text)
            except UsageError as error:
                self.report(
                    (*loc, i), error.message, "Write the name of a job, or NAME:ended if the job may also fail."
                )

    def _stage(self, stages: list[StageSpec], i: int, loc: Loc) -> StageTemplate:
        spec = stages[i]
        return StageTemplate(
            name=spec.name,
            task_s=self.distribution(spec.task, (*loc, "task")),
            after=field_types.upstream(stages, i),
            gather=_gather(spec.gather),
            groups=1 if spec.gather is None else spec.gather.groups,
            kind=WorkKind(spec.kind),
            slots=spec.slots,
            gpus=spec.gpus,
            memory_bytes=spec.memory,
            bundle=spec.bundle,
            pool=spec.pool,
            retry=spec.retry.rule(),
            fails=spec.fails,
            poison=spec.poison,
            speculative_copies=spec.speculative_copies,
        )

    def _job_file(self, file: Path, loc: Loc) -> JobFileSpec | None:
        """Return the content of a job file, or None if the job file has a mistake."""
        try:
            return job_file.load(file, needs_input=False).job
        except BatchlabError as error:
            message = f"The job file has a mistake: {error.message}"
            self.report((*loc, "file"), message, f"See `batchlab job check {file}`.")
            return None

    def _stages_of(self, stages: Sequence[JobFileStage], spec: JobSpec, loc: Loc) -> tuple[StageTemplate, ...]:
        at = (*loc, "task")
        names = [stage.name for stage in stages]
        times = None if spec.task is None else spec.task.by_stage
        for key, entries in (("task", times or {}), ("groups", spec.groups)):
            for name in entries:
                if name not in names:
                    message = f"The job file does not have a stage '{name}'."
                    self.report((*loc, key, name), message, suggest(name, names, "stages"), at_key=True)
        by_field = {stage.name for stage in stages if stage.gather is not None and stage.gather.by != "*"}
        for name in spec.groups:
            if name in names and name not in by_field:
                message = f"The stage '{name}' does not gather by a field: it has no groups."
                self.report((*loc, "groups", name), message, "Delete it.", at_key=True)
        if spec.task is None or times is not None:
            missing = [name for name in names if name not in (times or ())]
            if missing:
                message = f"It is not said how long the tasks of {', '.join(missing)} take."
                remedy = f"Write for example `task: {{{missing[0]}: 4s}}`."
                self.report(loc if spec.task is None else at, message, remedy, at_key=True)
        same = spec.task if times is None else None
        task_s = self.distribution(same, at) if same else distributions.Constant(1.0)
        by_stage = {name: self.distribution(time, (*at, name)) for name, time in (times or {}).items() if name in names}
        return tuple(
            StageTemplate(
                name=stage.name,
                task_s=by_stage.get(stage.name, task_s),
                after=field_types.upstream(stages, i),
                gather=_gather(stage.gather),
                groups=spec.groups.get(stage.name, 1),
                slots=stage.resources.slots,
                gpus=stage.resources.gpus,
                memory_bytes=stage.resources.memory,
                bundle=stage.bundle,
                pool=stage.pool,
                retry=stage.retry.rule(),
                speculative_copies=stage.speculative_copies and not stage.side_effects,
            )
            for i, stage in enumerate(stages)
        )

    def path(self, text: str, loc: Loc) -> Path | None:
        """Return the path of a file relative to the scenario's folder, or None if the path has a mistake."""
        if "://" in text or Path(text).is_absolute():
            remedy = "Write a path relative to the scenario, so that it can be moved with it."
            self.report(loc, f"{text!r} is not a path relative to the scenario.", remedy)
            return None
        path = handler_lookup.absolute(self.folder / text)
        if handler_lookup.is_file(path):
            return path
        what = "is a folder" if handler_lookup.is_folder(path) else "is not there"
        self.report(loc, f"The file {str(path)!r} {what}.", "Write the path of a file, relative to the scenario.")
        return None

    def source(self, number: int, spec: ArrivalSpec) -> Source | None:
        """Build the source of an arrival. Return None if the arrival is invalid."""
        loc: Loc = ("arrivals", number)
        kinds = [kind for kind in SOURCES if getattr(spec, kind) is not None]
        if len(kinds) != 1:
            what = f"has both {' and '.join(kinds)}" if kinds else "does not say when"
            self.report(loc, f"This arrival {what}.", f"Write one of {', '.join(SOURCES)}.", at_key=True)
            return None
        kind, job = kinds[0], spec.job or ""
        at = (*loc, kind)
        if not job and spec.trace is None:
            message = "This arrival does not say which job arrives."
            self.report(loc, message, "Write for example `job: claims`.", at_key=True)
        if spec.trace is not None:
            path = self.path(spec.trace.file, (*at, "file"))
            return None if path is None else self._trace(job, path, spec.trace, at)

        def make() -> Source:
            source = _synthetic_source(kind, job, getattr(spec, kind))
            jobs = self.jobs + source.at_least()
            if jobs > arrivals.MAX_JOBS:
                limit = f"the {arrivals.MAX_JOBS:,} of a whole scenario"
                raise ValueError(f"{jobs:,.0f} jobs so far are more than {limit}")
            self.jobs = jobs
            return source

        return self.build(at, make, None, "Change its numbers.")

    def _trace(self, job: str, path: Path, spec: TraceSpec, at: Loc) -> Source | None:
        form = TraceFormat(spec.format or _guess_format(path))
        for key, why in _unused_keys(form, spec, job):
            self.report((*at, *key), f"'{key[-1]}' means nothing {why}.", "Delete it.", at_key=True)

        def make() -> Trace:
            columns = _column_map(form, spec.columns)
            rest = spec.model_dump(include={"delimiter", "from_s", "until_s", "limit", "starts_s"})
            return Trace(template=job, path=path, format=form, columns=columns, names=tuple(spec.names), **rest)

        return self.build(at, make, None, "Change it.")


def _gather(spec: GatherSpec | GroupsSpec | None) -> str | None:
    """Return the gather value for a StageTemplate.

    Stand-in tasks do not need the name of the field by which results are grouped.
    """
    return None if spec is None else "*" if spec.by == "*" else "key"


def _unused_keys(form: TraceFormat, spec: TraceSpec, job: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each key of a trace that does not have an effect, with the reason."""
    if form is not TraceFormat.TABLE:
        for key in sorted({"names", "delimiter"} & spec.model_fields_set, reverse=True):
            yield (key,), f"in a trace of the format {form.value}"
    columns = spec.columns or ColumnsSpec()
    if not columns.count:
        for key in sorted({"every", "scale"} & columns.model_fields_set):
            yield ("columns", key), "without count"
    if job and columns.job:
        yield ("columns", "job"), "because the arrival names the job"


def _guess_format(path: Path) -> str:
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if ".swf" in suffixes:
        return "swf"
    return "jsonl" if suffixes & {".jsonl", ".ndjson", ".json"} else "table"


_FORMAT_COLUMNS = {TraceFormat.SWF: SWF_COLUMNS, TraceFormat.JSONL: RECORD_COLUMNS}
_COLUMN_FIELDS = {"every": "every_s", "job": "template"}


def _column_map(form: TraceFormat, spec: ColumnsSpec | None) -> Columns | None:
    """Return the trace format's column map with the changes in `spec`. Raise ValueError if the column map is
    invalid.
    """
    if spec is None:
        return None
    changes: dict[str, Any] = {_COLUMN_FIELDS.get(name, name): getattr(spec, name) for name in spec.model_fields_set}
    for name in ("tasks", "task_s"):
        if changes.get(name) is not None:
            changes[name] = ColumnSum(tuple(changes[name].columns), changes[name].per)
    base = _FORMAT_COLUMNS.get(form)
    return Columns(**{"at": "", **changes}) if base is None else replace(base, **changes)


_DISTRIBUTION_KINDS = tuple(schema_distributions.Draw.model_fields)
_DISTRIBUTIONS: Mapping[str, Callable[..., Distribution]] = {
    "uniform": distributions.Uniform,
    "exponential": distributions.Exponential,
    "lognormal": distributions.Lognormal,
    "pareto": distributions.Pareto,
    "weibull": distributions.Weibull,
}
_PROCESSES: Mapping[str, Callable[..., arrivals.Synthetic]] = {
    "poisson": arrivals.Poisson,
    "on_off": arrivals.OnOff,
    "profile": arrivals.Profile,
    "month_end": arrivals.MonthEnd,
    "step": arrivals.Step,
    "ramp": arrivals.Ramp,
}


def _synthetic_source(kind: str, job: str, spec: Any) -> arrivals.Synthetic:
    if kind == "at":
        return arrivals.FixedTimes(template=job, moments=tuple((moment.at_s, moment.count) for moment in spec))
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if kind == "month_end":
        fields["holidays"] = frozenset(spec.holidays)
    if kind == "step":
        fields["steps"] = tuple((step.at_s, step.per_hour) for step in spec.steps)
    return _PROCESSES[kind](template=job, **fields)


FAULTS: Mapping[str, FaultName] = {name.value: name for name in FaultName}


def fault(spec: FaultSpec) -> Fault:
    """Build the fault that `spec` describes."""
    fields = spec.model_dump(include={"share", "count", "rate", "zone", "pool"}, exclude_none=True)
    if spec.notice is not None:
        fields["notice_s"] = spec.notice
    return Fault(FAULTS[spec.fault], spec.at_s, spec.for_s, **fields)


def share_policy(spec: SharesSpec) -> SharePolicy:
    """Build the fair-share policy. Raise UsageError if entries overlap or a value is out of range."""
    entries = tuple(ShareAttributes(entry.identifier, entry.weight, entry.max_slots) for entry in spec.shares)
    return SharePolicy(entries, spec.decay, spec.reservation)


def expectations(spec: ScenarioSpec) -> tuple[Expectation, ...]:
    """Build the expectations for all jobs, followed by the expectations for the jobs of one template."""
    expect: Any = spec.expect
    scopes = [("", expect), *expect.jobs.items()]
    return tuple(expectation for template, scope in scopes for expectation in _expectations(scope, template))


def _expectations(spec: Any, template: str) -> Iterator[Expectation]:
    for name, measure in MEASURES.items():
        bound = getattr(spec, name, None)
        if bound is not None:
            limits = [bound.least, bound.most]
            if measure.unit is Unit.USD:
                limits = [None if limit is None else price_book.parse(limit) for limit in limits]
            yield Expectation(name, limits[0], limits[1], template)
