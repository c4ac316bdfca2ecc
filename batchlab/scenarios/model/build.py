"""Conversion of a scenario file's models to the values of values.py.

Each mistake becomes a Problem with its location, and a placeholder replaces the value, so that one
check finds all mistakes. The functions after ScenarioBuilder cannot fail because the checks run
before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from batchlab.core.errors import BatchlabError
from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.jobs import field_types, handler_lookup, job_file
from batchlab.jobs.schema import GatherSpec
from batchlab.jobs.validation import Structure
from batchlab.jobs.yaml_source import Loc, Problem, suggest
from batchlab.scenarios.model import arrivals, distributions, schema_distributions
from batchlab.scenarios.model.schema import SOURCES, ArrivalSpec, FaultSpec, ScenarioSpec
from batchlab.scenarios.model.schema_distributions import MomentSpec, MonthEndSpec, One, Span, StepSpec
from batchlab.scenarios.model.schema_jobs import ColumnsSpec, GroupsSpec, JobSpec, StageSpec, TraceSpec
from batchlab.scenarios.model.values import (
    Distribution,
    Expectation,
    Fault,
    FaultName,
    JobTemplate,
    Policy,
    PoolPlan,
    Prewarm,
    Source,
    StageTemplate,
    WorkKind,
)
from batchlab.scenarios.traces.rows import RECORD_COLUMNS, SWF_COLUMNS, Columns, ColumnSum
from batchlab.scenarios.traces.source import Trace, TraceFormat
from batchlab.scenarios.verdicts import MEASURES, Unit

T = TypeVar("T")
ONE_STAGE = "work"
"""Name of the stage of a job that has only a task time."""


@dataclass(slots=True)
class ScenarioBuilder:
    """Builder of the values of one file. Paths are relative to `folder`."""

    found: Structure[ScenarioSpec]
    folder: Path
    problems: list[Problem] = field(default_factory=list)
    jobs: float = 0.0
    """Minimum number of jobs from the sources built so far."""

    def tell(self, loc: Loc, message: str, remedy: str, *, at_key: bool = False) -> None:
        """Report a mistake, unless its location already has one."""
        if self.found.sound(loc):
            self.problems.append(Problem(loc, message, remedy, at_key))

    def made(self, loc: Loc, make: Callable[[], T], stand_in: T, remedy: str) -> T:
        """Return the result of `make`, or report its error at `loc` and return the stand-in."""
        if not self.found.sound(loc):
            return stand_in
        try:
            return make()
        except (ValueError, OverflowError) as error:
            self.tell(loc, f"This cannot be: {error}.", remedy)
            return stand_in

    def draw(self, spec: One[Any], loc: Loc) -> Distribution:
        """Build the distribution."""
        stand_in: Distribution = distributions.Constant(1.0)
        named = [key for key in _DISTRIBUTION_KINDS if getattr(spec, key, None) is not None]
        if len(named) != 1:
            what = "no distribution" if not named else f"more than one: {', '.join(named)}"
            remedy = "Write a number, or for example {lognormal: {median: 4, sigma: 0.8}}."
            self.tell(loc, f"There must be one distribution, but there is {what}.", remedy)
            return stand_in
        kind = named[0]
        value = getattr(spec, kind)
        if kind == "constant":
            return distributions.Constant(value)
        if kind == "mixture":
            parts = tuple((part.weight, self.draw(part, (*loc, kind, i))) for i, part in enumerate(value))
            return self.made((*loc, kind), lambda: distributions.Mixture(parts), stand_in, "Change it.")
        if kind == "empirical":
            return distributions.Empirical(tuple(value))
        numbers = value.model_dump()
        make = _DISTRIBUTIONS[kind]

        def usable() -> Distribution:
            distribution = make(**numbers)
            if not distribution.mean <= field_types.MAX_TASKS:
                raise ValueError("its mean is too large")
            return distribution

        return self.made((*loc, kind), usable, stand_in, "Change its numbers.")

    def job(self, name: str, spec: JobSpec) -> JobTemplate:
        """Build a job template, with the stages of the job file if it names one."""
        loc: Loc = ("jobs", name)
        stages: tuple[StageTemplate, ...] = ()
        file: Path | None = None
        if spec.file is not None:
            file = self.path(spec.file, (*loc, "file"))
            stages = () if file is None else self._stages_of(file, spec, loc)
        elif spec.stages is not None:
            at = (*loc, "stages")
            for check in (field_types.unique_names, field_types.order, field_types.gathers):
                if self.found.sound(at):
                    self.problems += check(spec.stages, at)
            stages = tuple(self._stage(spec.stages, i, (*at, i)) for i in range(len(spec.stages)))
        elif spec.task is not None:
            stages = (StageTemplate(ONE_STAGE, self.draw(spec.task, (*loc, "task"))),)
        else:
            remedy = "Write task: 4s, or stages:, or file:."
            self.tell(loc, f"Job '{name}' does not say what its work is.", remedy, at_key=True)
        if spec.groups and spec.file is None:
            message = "'groups' means nothing without a job file."
            remedy = "Delete it; a stage's own gather says how many groups there are."
            self.tell((*loc, "groups"), message, remedy, at_key=True)
        if spec.stages is not None and (spec.task is not None or spec.file is not None):
            other = "file" if spec.file is not None else "task"
            message = f"Job '{name}' has both stages and {other}."
            self.tell((*loc, other), message, "Delete one of the two.", at_key=True)
        return JobTemplate(
            name=name,
            stages=stages,
            tasks=distributions.Constant(1.0) if spec.tasks is None else self.draw(spec.tasks, (*loc, "tasks")),
            tenant=spec.tenant,
            priority=spec.priority,
            deadline_s=spec.deadline,
            max_failures=spec.max_failures,
            file=file,
        )

    def _stage(self, stages: list[StageSpec], i: int, loc: Loc) -> StageTemplate:
        spec = stages[i]
        return StageTemplate(
            name=spec.name,
            task_s=self.draw(spec.task, (*loc, "task")),
            after=field_types.upstream(stages, i),
            gather=_gather(spec.gather),
            groups=1 if spec.gather is None else spec.gather.groups,
            kind=WorkKind(spec.kind),
            slots=spec.slots,
            memory_bytes=spec.memory,
            bundle=spec.bundle,
            pool=spec.pool,
            retry=spec.retry.rule(),
            fails=spec.fails,
            poison=spec.poison,
        )

    def _stages_of(self, file: Path, spec: JobSpec, loc: Loc) -> tuple[StageTemplate, ...]:
        """Build the stages of a job file with the times in `spec`."""
        try:
            stages = job_file.load(file, needs_input=False).job.stages
        except BatchlabError as error:
            message = f"The job file has a mistake: {error.message}"
            self.tell((*loc, "file"), message, f"See `batchlab job check {file}`.")
            return ()
        at = (*loc, "task")
        names = [stage.name for stage in stages]
        times = None if spec.task is None else spec.task.by_stage
        for name in (*(times or ()), *spec.groups):
            if name not in names:
                key = "task" if name in (times or ()) else "groups"
                message = f"The job file has no stage '{name}'."
                remedy = suggest(name, names, "stages")
                self.tell((*loc, key, name), message, remedy, at_key=True)
        by_field = {
            stage_spec.name for stage_spec in stages if stage_spec.gather is not None and stage_spec.gather.by != "*"
        }
        for name in spec.groups:
            if name in names and name not in by_field:
                message = f"The stage '{name}' does not gather by a field: it has no groups."
                self.tell((*loc, "groups", name), message, "Delete it.", at_key=True)
        if spec.task is None or times is not None:
            missing = [name for name in names if name not in (times or ())]
            if missing:
                message = f"It is not said how long the tasks of {', '.join(missing)} take."
                remedy = f"Write for example `task: {{{missing[0]}: 4s}}`."
                self.tell(loc if spec.task is None else at, message, remedy, at_key=True)
        task_s: Distribution = distributions.Constant(1.0)
        if spec.task is not None and times is None:
            task_s = self.draw(spec.task, at)
        return tuple(
            StageTemplate(
                name=stage.name,
                task_s=self.draw(times[stage.name], (*at, stage.name))
                if times is not None and stage.name in times
                else task_s,
                after=field_types.upstream(stages, i),
                gather=_gather(stage.gather),
                groups=spec.groups.get(stage.name, 1),
                slots=stage.resources.slots,
                memory_bytes=stage.resources.memory,
                bundle=stage.bundle,
                pool=stage.pool,
                retry=stage.retry.rule(),
            )
            for i, stage in enumerate(stages)
        )

    def path(self, text: str, loc: Loc) -> Path | None:
        """Resolve a path relative to the scenario's folder.

        Return None if there is no such file.
        """
        if "://" in text or Path(text).is_absolute():
            remedy = "Write a path relative to the scenario, so that it can be moved with it."
            self.tell(loc, f"{text!r} is not a path relative to the scenario.", remedy)
            return None
        path = handler_lookup.absolute(self.folder / text)
        if not handler_lookup.is_file(path):
            what = "is a folder" if handler_lookup.is_folder(path) else "is not there"
            remedy = "Write the path of a file, relative to the scenario."
            self.tell(loc, f"The file {str(path)!r} {what}.", remedy)
            return None
        return path

    def source(self, number: int, spec: ArrivalSpec) -> Source | None:
        """Build the source of an arrival. Return None if the arrival is invalid."""
        loc: Loc = ("arrivals", number)
        named = [kind for kind in SOURCES if getattr(spec, kind) is not None]
        if len(named) != 1:
            what = f"has both {' and '.join(named)}" if named else "does not say when"
            remedy = f"Write one of {', '.join(SOURCES)}."
            self.tell(loc, f"This arrival {what}.", remedy, at_key=True)
            return None
        at = (*loc, named[0])
        job = spec.job or ""
        if not job and spec.trace is None:
            message = "This arrival does not say which job arrives."
            self.tell(loc, message, "Write for example `job: claims`.", at_key=True)
        if spec.trace is not None:
            path = self.path(spec.trace.file, (*at, "file"))
            return None if path is None else self._trace(job, path, spec.trace, at)
        value = getattr(spec, named[0])

        def usable() -> Source:
            found = _SOURCES[named[0]](job, value)
            jobs = self.jobs + found.at_least()
            if jobs > arrivals.MAX_JOBS:
                whole = f"the {arrivals.MAX_JOBS:,} of a whole scenario"
                raise ValueError(f"{jobs:,.0f} jobs so far are more than {whole}")
            self.jobs = jobs
            return found

        return self.made(at, usable, None, "Change its numbers.")

    def _trace(self, job: str, path: Path, spec: TraceSpec, at: Loc) -> Source | None:
        form = TraceFormat(spec.format or _format_of(path))
        for key, why in _unused_keys(form, spec, job):
            self.tell((*at, *key), f"'{key[-1]}' means nothing {why}.", "Delete it.", at_key=True)
        columns = _column_map(form, spec.columns)
        return self.made(
            at,
            lambda: Trace(
                template=job,
                path=path,
                format=form,
                columns=columns(),
                names=tuple(spec.names),
                delimiter=spec.delimiter,
                from_s=spec.from_s,
                until_s=spec.until_s,
                limit=spec.limit,
                starts_s=spec.starts_s,
            ),
            None,
            "Change it.",
        )


def _gather(spec: GatherSpec | GroupsSpec | None) -> str | None:
    """Return the gather value of a StageTemplate. Stand-ins do not need the group's field name."""
    return None if spec is None else "*" if spec.by == "*" else "key"


def _unused_keys(form: TraceFormat, spec: TraceSpec, job: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield keys that have no effect, and the reason."""
    if form is not TraceFormat.TABLE:
        for key in ("names", "delimiter"):
            if key in spec.model_fields_set:
                yield (key,), f"in a trace of the format {form.value}"
    columns = spec.columns or ColumnsSpec()
    if not columns.count:
        for key in ("every", "scale"):
            if key in columns.model_fields_set:
                yield ("columns", key), "without count"
    if job and columns.job:
        yield ("columns", "job"), "because the arrival names the job"


def _format_of(path: Path) -> str:
    """Guess the format from the file name."""
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if ".swf" in suffixes:
        return "swf"
    return "jsonl" if suffixes & {".jsonl", ".ndjson", ".json"} else "table"


def _column_map(form: TraceFormat, spec: ColumnsSpec | None) -> Callable[[], Columns | None]:
    """Return a function that builds the column map from the format's columns and `spec`.

    It may raise ValueError.
    """

    def make() -> Columns | None:
        if spec is None:
            return None
        known = {TraceFormat.SWF: SWF_COLUMNS, TraceFormat.JSONL: RECORD_COLUMNS}
        base = known.get(form)
        said: dict[str, Any] = {_COLUMN_FIELDS.get(name, name): getattr(spec, name) for name in spec.model_fields_set}
        for name in ("tasks", "task_s"):
            if said.get(name) is not None:
                said[name] = ColumnSum(tuple(said[name].columns), said[name].per)
        return Columns(**{"at": "", **said}) if base is None else replace(base, **said)

    return make


_COLUMN_FIELDS = {"every": "every_s", "job": "template"}

_DISTRIBUTION_KINDS = tuple(schema_distributions.Draw.model_fields)

_DISTRIBUTIONS: Mapping[str, Callable[..., Distribution]] = {
    "uniform": distributions.Uniform,
    "exponential": distributions.Exponential,
    "lognormal": distributions.Lognormal,
    "pareto": distributions.Pareto,
    "weibull": distributions.Weibull,
}


def _source_fields(spec: Span) -> dict[str, Any]:
    """Return the spec's fields as arguments of a source."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in ((name, getattr(spec, name)) for name in type(spec).model_fields)
    }


def _month_end_source(job: str, spec: MonthEndSpec) -> arrivals.Synthetic:
    numbers = {**_source_fields(spec), "holidays": frozenset(spec.holidays)}
    return arrivals.MonthEnd(template=job, **numbers)


def _step_source(job: str, spec: StepSpec) -> arrivals.Synthetic:
    steps = tuple((step.at_s, step.per_hour) for step in spec.steps)
    return arrivals.Step(template=job, **{**_source_fields(spec), "steps": steps})


def _fixed_source(job: str, spec: list[MomentSpec]) -> arrivals.Synthetic:
    return arrivals.FixedTimes(
        template=job, moments=tuple((moment_spec.at_s, moment_spec.count) for moment_spec in spec)
    )


_SOURCES: Mapping[str, Callable[[str, Any], arrivals.Synthetic]] = {
    "at": _fixed_source,
    "poisson": lambda job, spec: arrivals.Poisson(template=job, **_source_fields(spec)),
    "on_off": lambda job, spec: arrivals.OnOff(template=job, **_source_fields(spec)),
    "profile": lambda job, spec: arrivals.Profile(template=job, **_source_fields(spec)),
    "month_end": _month_end_source,
    "step": _step_source,
    "ramp": lambda job, spec: arrivals.Ramp(template=job, **_source_fields(spec)),
}


FAULTS: Mapping[str, FaultName] = {name.value: name for name in FaultName}


def pools(spec: ScenarioSpec) -> tuple[PoolPlan, ...]:
    """Build the pools in the order of the file."""
    found = []
    for name, pool_spec in spec.pools.items():
        pool = Pool(
            name, pool_spec.min, pool_spec.max, pool_spec.slots, pool_spec.boot, instance_type=pool_spec.instance_type
        )
        found.append(PoolPlan(pool, pool_spec.spot))
    return tuple(found)


def policy(spec: ScenarioSpec) -> Policy:
    return Policy(spec.policy.drain_target, spec.policy.cooldown_in, spec.policy.idle)


def prewarm(spec: ScenarioSpec) -> tuple[Prewarm, ...]:
    """Build the scheduled capacity in the order of the file."""
    return tuple(
        Prewarm(prewarm_spec.pool, prewarm_spec.min, prewarm_spec.at_s, prewarm_spec.until_s)
        for prewarm_spec in spec.prewarm
    )


def faults(spec: ScenarioSpec) -> tuple[Fault, ...]:
    """Build the faults in order of time."""
    return tuple(sorted(map(fault, spec.faults), key=lambda fault: fault.at_s))


def fault(spec: FaultSpec) -> Fault:
    """Build a fault."""
    said = {
        "share": spec.share,
        "count": spec.count,
        "rate": spec.rate,
        "notice_s": spec.notice,
        "zone": spec.zone,
        "pool": spec.pool,
    }
    more: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
    return Fault(FAULTS[spec.fault], spec.at_s, spec.for_s, **more)


def expectations(spec: ScenarioSpec) -> tuple[Expectation, ...]:
    """Build the expectations. Those of single templates come last."""
    whole: Any = spec.expect
    expectations = list(_expectations(whole, ""))
    for name, own in whole.jobs.items():
        expectations += _expectations(own, name)
    return tuple(expectations)


def _expectations(spec: Any, template: str) -> Iterator[Expectation]:
    for name, measure in MEASURES.items():
        bound = getattr(spec, name, None)
        if bound is not None:
            limits = [bound.least, bound.most]
            if measure.unit is Unit.USD:
                limits = [None if limit is None else price_book.parse(limit) for limit in limits]
            least, most = limits
            yield Expectation(name, least, most, template)
