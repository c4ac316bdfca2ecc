"""Loader of scenario files: functions that find, load, and check a file, and list the installed scenarios.

A loaded Scenario has passed every check. The jobs, pools, zones, and instance types of a loaded Scenario exist, and a
record has its expected measures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError
from pathlib import Path
from typing import Any

from batchlab.core import installation, instance_types
from batchlab.core.errors import UsageError
from batchlab.core.fair_share import MAX_DECAY_S, ShareAttributes
from batchlab.core.model import Pool
from batchlab.core.pricing import price_book
from batchlab.core.text import count
from batchlab.jobs import handler_lookup, yaml_source
from batchlab.jobs.field_types import MAX_TASKS
from batchlab.jobs.validation import Structure, validate
from batchlab.jobs.yaml_source import Loc, Problem, suggest
from batchlab.scenarios.model import build, expansion
from batchlab.scenarios.model.build import FAULTS
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.schema import SHAPE, FaultSpec, PoolSpec, ScenarioSpec, is_text
from batchlab.scenarios.model.schema_distributions import StepSpec
from batchlab.scenarios.model.values import LASTING_FAULTS, FaultName, JobTemplate, Policy, PoolPlan, Prewarm, Scenario
from batchlab.scenarios.verdicts import MEASURES


@dataclass(frozen=True, slots=True)
class CheckedScenario:
    """Validated scenario in which placeholders replace invalid values, with its problems."""

    structure: Structure[ScenarioSpec]
    spec: ScenarioSpec
    jobs: Mapping[str, JobTemplate]

    def is_sound(self, *loc: str | int) -> bool:
        """Return whether the value at the location `loc` in the scenario file is free of mistakes."""
        return self.structure.sound(loc)

    def check_name(
        self, section: str, name: str, loc: Loc, purpose: str = "", *, at_key: bool = False
    ) -> list[Problem]:
        """Return a problem if the section of the scenario file lacks an entry with the name.

        An invalid entry with the name is not reported, because another check has reported the entry.
        """
        entries = getattr(self.spec, section)
        if name in entries:
            return []
        for broken in self.structure.broken:
            if broken[:1] == (section,) and (broken[1:2] in ((), (name,)) or broken[-1] == "[key]"):
                return []
        message = f"There is no {section.removesuffix('s')} '{name}'{purpose}."
        return [Problem(loc, message, suggest(name, entries, section), at_key)]


ZONES = "abcdef"

_INSTANCE_FAULTS = frozenset(
    {FaultName.KILL, FaultName.PAUSE, FaultName.PARTITION, FaultName.SPOT_WAVE, FaultName.SLOW_DISK}
)
_CALL_FAULTS = frozenset({FaultName.S3_ERRORS, FaultName.SQS_DUPLICATES, FaultName.SQS_DELAYS})
_FAULTS_BY_KEY: Mapping[str, frozenset[FaultName]] = {
    "for_s": LASTING_FAULTS,
    "pool": _INSTANCE_FAULTS,
    "share": _INSTANCE_FAULTS,
    "count": _INSTANCE_FAULTS,
    "rate": _CALL_FAULTS,
    "notice": frozenset({FaultName.SPOT_WAVE}),
    "zone": frozenset({FaultName.ZONE_LOSS}),
}
"""Keys of a fault that have an effect only for some kinds of faults, with these kinds of faults."""
_MAY_END_AT_ONCE = frozenset({FaultName.MANAGER_CRASH, FaultName.DATABASE_LOSS})
"""Faults whose duration may be 0."""
_ZERO_MESSAGES = {
    "for_s": "It is over as soon as it has begun.",
    "share": "A share of 0 hits no instance.",
    "rate": "A rate of 0 hits nothing.",
}
"""Error messages for the value 0 of a fault's key, by key."""


def find_problems(structure: Structure[ScenarioSpec], jobs: Mapping[str, JobTemplate]) -> list[Problem]:
    """Return the problems of all checks whose inputs are valid."""
    if structure.whole is None:
        return []
    subject = CheckedScenario(structure, structure.whole, jobs)
    problems = [problem for check, places in _CHECKS if structure.sound(*places) for problem in check(subject)]
    return [problem for problem in problems if problem.loc is None or structure.sound(problem.loc)]


def _pools(subject: CheckedScenario) -> Iterator[Problem]:
    types = instance_types.load()
    for name, pool in subject.spec.pools.items():
        loc: Loc = ("pools", name)
        if pool.min > pool.max:
            message = f"min ({pool.min}) is more than max ({pool.max})."
            yield Problem((*loc, "min"), message, "Write the smaller number as min.")
        if pool.instance_type:
            try:
                types.of(pool.instance_type)
            except UsageError as error:
                yield Problem((*loc, "instance_type"), error.message, error.remedy)


def _stages(subject: CheckedScenario) -> Iterator[Problem]:
    for template in subject.jobs.values():
        for i, stage in enumerate(template.stages):
            pool = subject.spec.pools.get(stage.pool)
            loc = _stage_location(subject, template, i, "pool")
            yield from subject.check_name("pools", stage.pool, loc, f" for the stage '{stage.name}'")
            if pool is not None and stage.slots > pool.slots and subject.is_sound("pools", stage.pool):
                message = (
                    f"A task of the stage '{stage.name}' takes {stage.slots} slots, and an instance of the pool "
                    f"'{stage.pool}' has {pool.slots}: it would never run."
                )
                loc = _stage_location(subject, template, i, "slots")
                yield Problem(loc, message, "Give the pool's instances more slots.")
            if pool is not None and stage.gpus and stage.gpus > _gpus(pool) and subject.is_sound("pools", stage.pool):
                message = (
                    f"A task of the stage '{stage.name}' takes {count(stage.gpus, 'GPU')}, and an instance of the pool "
                    f"'{stage.pool}' has {_gpus(pool)}: it would never run."
                )
                yield Problem(loc, message, "Name an instance type with enough GPUs, or set `gpus` of the pool.")


def _gpus(pool: PoolSpec) -> int:
    """Return the number of GPUs of an instance. The catalog is read only for a pool with an instance type."""
    if pool.gpus is not None:
        return pool.gpus
    return instance_types.load().gpus([pool.instance_type]) if pool.instance_type else 0


def _stage_location(subject: CheckedScenario, template: JobTemplate, stage: int, key: str) -> Loc:
    """Return the location of a stage's key in the scenario file.

    If the job does not list stages, return the location of the job or of the job's file.
    """
    loc: Loc = ("jobs", template.name)
    if template.file is not None:
        return (*loc, "file")
    return (*loc, "stages", stage, key) if subject.spec.jobs[template.name].stages else loc


def _joins(subject: CheckedScenario) -> Iterator[Problem]:
    """Check the item-by-item joins of stages, except for jobs whose numbers of tasks come from a trace."""
    for template in subject.jobs.values():
        if any(arrival.trace is not None and arrival.job in (None, template.name) for arrival in subject.spec.arrivals):
            continue
        is_fixed = isinstance(template.tasks, Constant)
        tasks = max(1, int(template.tasks.mean + 0.5)) if is_fixed else MAX_TASKS
        try:
            stage = expansion.find_unequal_join(template, tasks)
        except ValueError:
            continue  # the check skips the job, because the cycle of its stages is already reported
        if stage is not None:
            loc = _stage_location(subject, template, template.stages.index(stage), "after")
            yield Problem(loc, expansion.unequal_join_message(stage), expansion.UNEQUAL_JOIN_REMEDY)


def _dependencies(subject: CheckedScenario) -> Iterator[Problem]:
    for name, job in subject.jobs.items():
        names: list[str] = [dependency.job for dependency in job.after]
        for i, other in enumerate(names):
            loc: Loc = ("jobs", name, "after", i)
            yield from subject.check_name("jobs", other, loc, " to wait for")
            if other in names[:i]:
                yield Problem(loc, f"'{other}' is named twice.", "Delete one of the two.")
    try:
        expansion.template_ranks(subject.jobs)
    except CycleError as error:
        circle = [str(name) for name in reversed(error.args[1])]
        message = f"These jobs would wait for each other: {' after '.join(circle)}."
        yield Problem(("jobs", circle[0], "after"), message, "Delete one of the dependencies.", at_key=True)


def _arrivals(subject: CheckedScenario) -> Iterator[Problem]:
    for i, arrival in enumerate(subject.spec.arrivals):
        if arrival.step is not None and subject.is_sound("arrivals", i, "step"):
            yield from _steps(arrival.step, ("arrivals", i, "step", "steps"))
        if arrival.job is not None:
            yield from subject.check_name("jobs", arrival.job, ("arrivals", i, "job"))


def _steps(spec: StepSpec, loc: Loc) -> Iterator[Problem]:
    """Yield a problem for each step that does not change the arrival rate."""
    for i, step in enumerate(spec.steps):
        if step.at_s >= spec.until_s:
            message = f"Nothing arrives from {spec.until_s:g} s on: this step never comes."
            yield Problem((*loc, i, "at"), message, "Write a later until, or delete the step.")
        elif i and step.at_s == spec.steps[i - 1].at_s:
            message = f"Two steps are at {step.at_s:g} s."
            yield Problem((*loc, i, "at"), message, "Delete one of the two, or write a later at.")


def _shares(subject: CheckedScenario) -> Iterator[Problem]:
    policy = subject.spec.shares
    if policy is None:
        return
    if policy.decay > MAX_DECAY_S:
        yield Problem(("shares", "decay"), "A share decay is at most 7 days.", "Write 7d or less.")
    entries = [ShareAttributes(entry.identifier) for entry in policy.shares]
    for i, entry in enumerate(entries):
        if other := next((other for other in entries[:i] if other.overlaps(entry)), None):
            message = f"The entries '{other.identifier}' and '{entry.identifier}' apply to the same share."
            yield Problem(("shares", "shares", i, "identifier"), message, "Delete one of the two.")


def _prewarm(subject: CheckedScenario) -> Iterator[Problem]:
    for i, spec in enumerate(subject.spec.prewarm):
        loc: Loc = ("prewarm", i)
        yield from subject.check_name("pools", spec.pool, (*loc, "pool"), " to warm up")
        pool = subject.spec.pools.get(spec.pool)
        if pool is not None and subject.is_sound("pools", spec.pool):
            if spec.min > pool.max:
                message = f"The pool '{spec.pool}' has {pool.max} instances at the most."
                yield Problem((*loc, "min"), message, f"Write {pool.max} or less, or raise its max.")
            elif spec.min <= pool.min <= pool.max:
                message = f"The pool '{spec.pool}' always has {pool.min} instances or more."
                yield Problem((*loc, "min"), message, f"Write {pool.min + 1} or more, or delete it.")
        if spec.until_s <= spec.at_s and subject.is_sound(*loc, "at"):
            yield Problem((*loc, "until"), "It ends before it begins.", "Write an until that is later than at.")


def _faults(subject: CheckedScenario) -> Iterator[Problem]:
    letters = ZONES[: subject.spec.zones]
    for i, spec in enumerate(subject.spec.faults):
        loc: Loc = ("faults", i)
        yield from _unused_fault_keys(spec, loc)
        if spec.pool is not None:
            yield from subject.check_name("pools", spec.pool, (*loc, "pool"), " to break")
        if spec.zone is not None and (len(spec.zone) != 1 or spec.zone not in letters):
            message = f"There is no zone '{spec.zone}': the fleet has {subject.spec.zones}."
            yield Problem((*loc, "zone"), message, f"Write {' or '.join(letters)}, or raise zones.")
        pools = [pool for name, pool in subject.spec.pools.items() if spec.pool in (None, name)]
        is_known = FAULTS[spec.fault] is FaultName.SPOT_WAVE and pools and subject.is_sound("pools")
        if is_known and not any(pool.spot for pool in pools):
            message = "A Spot wave interrupts Spot Instances, and the scenario has none."
            yield Problem((*loc, "fault"), message, "Give a pool a Spot share, such as spot: 0.5.")


def _overlaps(subject: CheckedScenario) -> Iterator[Problem]:
    """Report overlapping faults of the same kind, because the end of one fault would also end the other fault."""
    specs = enumerate(subject.spec.faults)
    faults = [(("faults", i), build.fault(spec)) for i, spec in specs if subject.is_sound("faults", i)]
    for n, (loc, fault) in enumerate(faults):
        for _, other in faults[:n]:
            begins_s = max(fault.at_s, other.at_s)
            ends_s = min(fault.at_s + fault.for_s, other.at_s + other.for_s)
            if fault.shares(other) and (begins_s < ends_s or fault.at_s == other.at_s):
                message = (
                    f"It overlaps with another {fault.name.value}, which lasts from {other.at_s:g} s to "
                    f"{other.at_s + other.for_s:g} s."
                )
                remedy = "Let one be over before the other begins, or make one of the two."
                yield Problem((*loc, "at"), message, remedy)
                break


def _unused_fault_keys(spec: FaultSpec, loc: Loc) -> Iterator[Problem]:
    fault = FAULTS[spec.fault]
    for key, faults in _FAULTS_BY_KEY.items():
        if key not in spec.model_fields_set:
            continue
        name = key.removesuffix("_s")
        if fault not in faults:
            message = f"'{name}' means nothing for {fault.value}."
            remedy = f"Delete it; it goes with {', '.join(sorted(faults))}."
            yield Problem((*loc, name), message, remedy, at_key=True)
        elif key in _ZERO_MESSAGES and fault not in _MAY_END_AT_ONCE and not getattr(spec, key):
            yield Problem((*loc, name), _ZERO_MESSAGES[key], "Write more than 0, or delete the fault.")
    if spec.share is not None and spec.count is not None:
        yield Problem((*loc, "count"), "It says both a share and a count.", "Delete one of the two.", at_key=True)


def _expectations(subject: CheckedScenario) -> Iterator[Problem]:
    expect: Any = subject.spec.expect
    loc: Loc = ("expect",)
    yield from _bounds(expect, loc)
    for name, own in expect.jobs.items():
        at = (*loc, "jobs", name)
        yield from subject.check_name("jobs", name, at, " to expect this of", at_key=True)
        yield from _bounds(own, at)
        job = subject.jobs.get(name) if subject.is_sound("jobs", name, "deadline") else None
        if own.late is not None and job is not None and job.deadline_s is None:
            message = f"The job '{name}' has no deadline to miss."
            yield Problem((*at, "late"), message, "Give it a deadline.", at_key=True)
    has_deadline = any(job.deadline_s is not None for job in subject.jobs.values())
    if expect.late is not None and subject.is_sound("jobs") and not has_deadline:
        message = "No job has a deadline to miss."
        yield Problem((*loc, "late"), message, "Give one of the jobs a deadline.", at_key=True)


def _bounds(spec: Any, loc: Loc) -> Iterator[Problem]:
    for name in MEASURES:
        bound = getattr(spec, name, None)
        if bound is None:
            continue
        if bound.least is None and bound.most is None:
            yield Problem((*loc, name), "It says neither least nor most.", f"Write `{name}: 0`.")
        elif None not in (bound.least, bound.most) and _number(bound.least) > _number(bound.most):
            yield Problem((*loc, name), "least is more than most.", "Write the smaller one as least.")


def _number(limit: float | str) -> float:
    return price_book.parse(limit) if isinstance(limit, str) else limit


def _price(subject: CheckedScenario) -> Iterator[Problem]:
    expect: Any = subject.spec.expect
    for name, pool in subject.spec.pools.items():
        if expect.cost is not None and not pool.instance_type:
            message = f"What it costs cannot be known: the pool '{name}' has no instance type."
            yield Problem(("expect", "cost"), message, "Give it one, such as m7i.large.")


_CHECKS: tuple[tuple[Callable[[CheckedScenario], Iterator[Problem]], tuple[Loc, ...]], ...] = (
    (_pools, ()),
    (_stages, ()),
    (_joins, (("arrivals",),)),
    (_dependencies, ()),
    (_arrivals, ()),
    (_shares, (("shares",),)),
    (_prewarm, ()),
    (_faults, (("zones",),)),
    (_overlaps, ()),
    (_expectations, ()),
    (_price, (("pools",),)),
)


FOLDER = "scenarios"
SUFFIX = ".yaml"
_TEACHES = "It teaches "
_REMEDY = "Write its path, or the name of one that `batchlab scenario list` shows."


@dataclass(frozen=True, slots=True)
class ShippedScenario:
    """Scenario that is part of the package. `teaches` is the lesson that the scenario's description names."""

    name: str
    teaches: str
    path: Path


def names() -> list[str]:
    """Return the sorted names of the installed scenarios."""
    return sorted(path.stem for path in installation.folder(FOLDER).glob(f"*{SUFFIX}"))


def shipped_scenarios() -> list[ShippedScenario]:
    """Return the installed scenarios, sorted by name."""
    paths = [installation.folder(FOLDER) / f"{name}{SUFFIX}" for name in names()]
    return [ShippedScenario(path.stem, lesson_of(load(path).about), path) for path in paths]


def lesson_of(about: str) -> str:
    """Return the part of the description after "It teaches", up to the end of the sentence or a colon. If the
    description lacks "It teaches", return the first sentence of the description.
    """
    text = " ".join(about.split())
    text = text.partition(_TEACHES)[2] or text
    return text.partition(". ")[0].partition(": ")[0].rstrip(".")


def find(text: str) -> Path:
    """Return the path of the scenario that `text` names. `text` is a path or the name of a shipped scenario."""
    if handler_lookup.is_file(Path(text)) or "/" in text or text.endswith((SUFFIX, ".yml")):
        return Path(text)
    if text not in names():
        raise UsageError(f"The scenario {text!r} does not exist.", remedy=suggest(text, names(), "installed scenarios"))
    return installation.folder(FOLDER) / f"{text}{SUFFIX}"


def load(path: Path) -> Scenario:
    """Read and check a scenario. Raise JobFileErrors with all mistakes in the file."""
    path = handler_lookup.absolute(path)
    return parse(yaml_source.text_of(path, SHAPE.what, _REMEDY), path)


def parse(text: str, path: Path) -> Scenario:
    """Parse and check the text of a scenario file. Raise JobFileErrors with all mistakes in the text."""
    document = yaml_source.parse(text, is_text)
    if isinstance(document.data, dict) and {"input", "stages"} <= document.data.keys():
        raise yaml_source.wrong_kind(
            path,
            "There is no key 'input' here: this is a job file, not a scenario.",
            "`batchlab run` runs it; a scenario's job may name it, as `file: job.yaml`.",
        )
    problems = list(document.problems)
    scenario: Scenario | None = None
    if document.data is not None or not problems:
        structure = validate(document.data, SHAPE, {problem.loc for problem in problems})
        problems += structure.problems
        if structure.whole is not None:
            scenario, more = _build_scenario(structure, structure.whole, text, path)
            problems += more
    if problems or scenario is None:
        raise yaml_source.errors(path, document, problems)
    return scenario


def _build_scenario(
    structure: Structure[ScenarioSpec], spec: ScenarioSpec, text: str, path: Path
) -> tuple[Scenario, Sequence[Problem]]:
    builder = build.ScenarioBuilder(structure, path.parent)
    jobs = {name: builder.job(name, job) for name, job in spec.jobs.items()}
    arrivals = [builder.source(i, arrival) for i, arrival in enumerate(spec.arrivals)]
    scenario = Scenario(
        name=spec.name,
        about=spec.about.strip(),
        jobs=jobs,
        arrivals=tuple(arrival for arrival in arrivals if arrival is not None),
        pools=tuple(
            PoolPlan(
                Pool(
                    name, pool.min, pool.max, pool.slots, pool.boot, instance_type=pool.instance_type, gpus=_gpus(pool)
                ),
                pool.spot,
            )
            for name, pool in spec.pools.items()
        ),
        seed=spec.seed,
        policy=Policy(spec.policy.drain_target, spec.policy.cooldown_in, spec.policy.idle),
        prewarm=tuple(Prewarm(warm.pool, warm.min, warm.at_s, warm.until_s) for warm in spec.prewarm),
        faults=tuple(sorted(map(build.fault, spec.faults), key=lambda fault: fault.at_s)),
        expect=build.expectations(spec),
        zones=spec.zones,
        compress=spec.compress,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        path=path,
    )
    problems = [*builder.problems, *find_problems(structure, jobs)]
    if spec.shares is not None and not problems:
        scenario = replace(scenario, shares=build.share_policy(spec.shares))
    return scenario, problems
