"""Scenario files: find, load, and check them, and list the shipped ones.

A loaded Scenario has passed every check: it names only existing jobs, pools, zones, and instance
types, and expects only measures that a record has. It depends only on the file's text and location.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlab.core import installation, instance_types
from batchlab.core.errors import UsageError
from batchlab.core.pricing import price_book
from batchlab.jobs import handler_lookup, yaml_source
from batchlab.jobs.field_types import MAX_TASKS
from batchlab.jobs.validation import Structure, validate
from batchlab.jobs.yaml_source import Loc, Problem, suggest
from batchlab.scenarios.model import build, expansion
from batchlab.scenarios.model.build import FAULTS
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.schema import SHAPE, FaultSpec, ScenarioSpec, is_text
from batchlab.scenarios.model.schema_distributions import StepSpec
from batchlab.scenarios.model.values import LASTING_FAULTS, FaultName, JobTemplate, Scenario, Source
from batchlab.scenarios.verdicts import MEASURES


@dataclass(frozen=True, slots=True)
class CheckedScenario:
    """Validated scenario in which placeholders replace invalid values, with its problems."""

    found: Structure[ScenarioSpec]
    spec: ScenarioSpec
    jobs: Mapping[str, JobTemplate]

    def unknown(self, section: str, name: str) -> bool:
        """Return whether the file has no entry of that name, not even an invalid one."""
        if name in getattr(self.spec, section):
            return False
        for loc in self.found.broken:
            if loc[:1] == (section,) and (loc[1:2] in ((), (name,)) or loc[-1] == "[key]"):
                return False
        return True

    def whole(self, pool: str) -> bool:
        """Return whether the pool has no mistakes."""
        return self.found.sound(("pools", pool))


ZONES = "abcdef"

_HITS_INSTANCES = frozenset(
    {FaultName.KILL, FaultName.PAUSE, FaultName.PARTITION, FaultName.SPOT_WAVE, FaultName.SLOW_DISK}
)
_HITS_CALLS = frozenset({FaultName.S3_ERRORS, FaultName.SQS_DUPLICATES, FaultName.SQS_DELAYS})
_FAULTS_BY_KEY: Mapping[str, frozenset[FaultName]] = {
    "for_s": LASTING_FAULTS,
    "pool": _HITS_INSTANCES,
    "share": _HITS_INSTANCES,
    "count": _HITS_INSTANCES,
    "rate": _HITS_CALLS,
    "notice": frozenset({FaultName.SPOT_WAVE}),
    "zone": frozenset({FaultName.ZONE_LOSS}),
}
"""Keys that have an effect only for some faults."""
_MAY_END_AT_ONCE = frozenset({FaultName.MANAGER_CRASH, FaultName.DATABASE_LOSS})
"""Faults that may have a duration of 0."""
_ZERO_MESSAGES = {
    "for_s": "It is over as soon as it has begun.",
    "share": "A share of 0 hits no instance.",
    "rate": "A rate of 0 hits nothing.",
}
"""Messages for a value of 0."""


def find_problems(found: Structure[ScenarioSpec], jobs: Mapping[str, JobTemplate]) -> list[Problem]:
    """Return the problems of all checks whose inputs are valid."""
    if found.whole is None:
        return []
    subject = CheckedScenario(found, found.whole, jobs)
    problems: list[Problem] = []
    for check, places in _CHECKS:
        if found.sound(*places):
            problems.extend(check(subject))
    return [problem for problem in problems if problem.loc is None or found.sound(problem.loc)]


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
    """Check the pool of each stage."""
    for template in subject.jobs.values():
        for i, stage in enumerate(template.stages):
            pool = subject.spec.pools.get(stage.pool)
            if subject.unknown("pools", stage.pool):
                message = f"There is no pool '{stage.pool}' for the stage '{stage.name}'."
                loc = _stage_location(subject, template, i, "pool")
                yield Problem(loc, message, suggest(stage.pool, subject.spec.pools, "pools"))
            elif pool is not None and stage.slots > pool.slots and subject.whole(stage.pool):
                message = (
                    f"A task of the stage '{stage.name}' takes {stage.slots} slots, and an "
                    f"instance of the pool '{stage.pool}' has {pool.slots}: it would never run."
                )
                remedy = "Give the pool's instances more slots."
                yield Problem(_stage_location(subject, template, i, "slots"), message, remedy)


def _stage_location(subject: CheckedScenario, template: JobTemplate, stage: int, key: str) -> Loc:
    """Return the location of the stage's key, or of the job if it has no stages."""
    loc: Loc = ("jobs", template.name)
    if template.file is not None:
        return (*loc, "file")
    return (*loc, "stages", stage, key) if subject.spec.jobs[template.name].stages else loc


def _joins(subject: CheckedScenario) -> Iterator[Problem]:
    """Check item-by-item joins, except for jobs whose task counts come from a trace."""
    for template in subject.jobs.values():
        if any(arrival.trace is not None and arrival.job in (None, template.name) for arrival in subject.spec.arrivals):
            continue
        always = isinstance(template.tasks, Constant)
        tasks = max(1, int(template.tasks.mean + 0.5)) if always else MAX_TASKS
        try:
            stage = expansion.find_unequal_join(template, tasks)
        except ValueError:
            continue  # the cycle of its stages is already reported
        if stage is not None:
            loc = _stage_location(subject, template, template.stages.index(stage), "after")
            yield Problem(loc, expansion.unequal_join_message(stage), expansion.UNEQUAL_JOIN_REMEDY)


def _arrivals(subject: CheckedScenario) -> Iterator[Problem]:
    for i, arrival in enumerate(subject.spec.arrivals):
        if arrival.step is not None and subject.found.sound(("arrivals", i, "step")):
            yield from _steps(arrival.step, ("arrivals", i, "step", "steps"))
        if arrival.job is not None and subject.unknown("jobs", arrival.job):
            message = f"There is no job '{arrival.job}'."
            yield Problem(("arrivals", i, "job"), message, suggest(arrival.job, subject.spec.jobs, "jobs"))


def _steps(spec: StepSpec, loc: Loc) -> Iterator[Problem]:
    """Report steps without an effect."""
    for i, step_at in enumerate(spec.steps):
        if step_at.at_s >= spec.until_s:
            message = f"Nothing arrives from {spec.until_s:g} s on: this step never comes."
            yield Problem((*loc, i, "at"), message, "Write a later until, or delete the step.")
        elif i and step_at.at_s == spec.steps[i - 1].at_s:
            message = f"Two steps are at {step_at.at_s:g} s."
            yield Problem((*loc, i, "at"), message, "Delete one of the two, or write a later at.")


def _prewarm(subject: CheckedScenario) -> Iterator[Problem]:
    for i, prewarm_spec in enumerate(subject.spec.prewarm):
        loc: Loc = ("prewarm", i)
        pool = subject.spec.pools.get(prewarm_spec.pool)
        if subject.unknown("pools", prewarm_spec.pool):
            message = f"There is no pool '{prewarm_spec.pool}' to warm up."
            yield Problem((*loc, "pool"), message, suggest(prewarm_spec.pool, subject.spec.pools, "pools"))
        elif pool is not None and prewarm_spec.min > pool.max and subject.whole(prewarm_spec.pool):
            message = f"The pool '{prewarm_spec.pool}' has {pool.max} instances at the most."
            yield Problem((*loc, "min"), message, f"Write {pool.max} or less, or raise its max.")
        elif pool is not None and prewarm_spec.min <= pool.min <= pool.max and subject.whole(prewarm_spec.pool):
            message = f"The pool '{prewarm_spec.pool}' always has {pool.min} instances or more."
            yield Problem((*loc, "min"), message, f"Write {pool.min + 1} or more, or delete it.")
        if prewarm_spec.until_s <= prewarm_spec.at_s and subject.found.sound((*loc, "at")):
            message = "It ends before it begins."
            yield Problem((*loc, "until"), message, "Write an until that is later than at.")


def _faults(subject: CheckedScenario) -> Iterator[Problem]:
    for i, fault_spec in enumerate(subject.spec.faults):
        loc: Loc = ("faults", i)
        yield from _unused_fault_keys(fault_spec, loc)
        if fault_spec.pool is not None and subject.unknown("pools", fault_spec.pool):
            message = f"There is no pool '{fault_spec.pool}' to break."
            yield Problem((*loc, "pool"), message, suggest(fault_spec.pool, subject.spec.pools, "pools"))
        letters = ZONES[: subject.spec.zones]
        if fault_spec.zone is not None and (len(fault_spec.zone) != 1 or fault_spec.zone not in letters):
            message = f"There is no zone '{fault_spec.zone}': the fleet has {subject.spec.zones}."
            remedy = f"Write {' or '.join(letters)}, or raise zones."
            yield Problem((*loc, "zone"), message, remedy)
        if FAULTS[fault_spec.fault] is FaultName.SPOT_WAVE:
            yield from _without_spot(subject, fault_spec, loc)


def _overlaps(subject: CheckedScenario) -> Iterator[Problem]:
    """Report overlapping faults: the end of the first would also end the second."""
    faults = [
        (("faults", i), build.fault(one))
        for i, one in enumerate(subject.spec.faults)
        if subject.found.sound(("faults", i))
    ]
    for n, (loc, one) in enumerate(faults):
        for _, other in faults[:n]:
            begins_s = max(one.at_s, other.at_s)
            ends_s = min(one.at_s + one.for_s, other.at_s + other.for_s)
            if one.shares(other) and (begins_s < ends_s or one.at_s == other.at_s):
                message = (
                    f"It overlaps with another {one.name.value}, which lasts from {other.at_s:g} s "
                    f"to {other.at_s + other.for_s:g} s."
                )
                remedy = "Let one be over before the other begins, or make one of the two."
                yield Problem((*loc, "at"), message, remedy)
                break


def _unused_fault_keys(one: FaultSpec, loc: Loc) -> Iterator[Problem]:
    fault = FAULTS[one.fault]
    for key, faults in _FAULTS_BY_KEY.items():
        if key not in one.model_fields_set:
            continue
        name = key.removesuffix("_s")
        if fault not in faults:
            message = f"'{name}' means nothing for {fault.value}."
            remedy = f"Delete it; it goes with {', '.join(sorted(faults))}."
            yield Problem((*loc, name), message, remedy, at_key=True)
        elif key in _ZERO_MESSAGES and fault not in _MAY_END_AT_ONCE and not getattr(one, key):
            yield Problem((*loc, name), _ZERO_MESSAGES[key], "Write more than 0, or delete the fault.")
    if one.share is not None and one.count is not None:
        message = "It says both a share and a count."
        yield Problem((*loc, "count"), message, "Delete one of the two.", at_key=True)


def _without_spot(subject: CheckedScenario, one: FaultSpec, loc: Loc) -> Iterator[Problem]:
    hit = [name for name in subject.spec.pools if one.pool in (None, name)]
    if hit and subject.found.sound(("pools",)) and not any(subject.spec.pools[name].spot for name in hit):
        message = "A Spot wave takes Spot instances, and there are none."
        yield Problem((*loc, "fault"), message, "Give a pool a share of them, such as spot: 0.5.")


def _expectations(subject: CheckedScenario) -> Iterator[Problem]:
    whole: Any = subject.spec.expect
    loc: Loc = ("expect",)
    yield from _bounds(whole, loc)
    for name, own in whole.jobs.items():
        at = (*loc, "jobs", name)
        if subject.unknown("jobs", name):
            message = f"There is no job '{name}' to expect this of."
            yield Problem(at, message, suggest(name, subject.spec.jobs, "jobs"), at_key=True)
        yield from _bounds(own, at)
        job = subject.jobs.get(name)
        known = subject.found.sound(("jobs", name, "deadline"))
        if own.late is not None and job is not None and job.deadline_s is None and known:
            message = f"The job '{name}' has no deadline to miss."
            yield Problem((*at, "late"), message, "Give it a deadline.", at_key=True)
    known = subject.found.sound(("jobs",))
    if whole.late is not None and known and all(job.deadline_s is None for job in subject.jobs.values()):
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
            message = "least is more than most."
            yield Problem((*loc, name), message, "Write the smaller one as least.")


def _number(limit: float | str) -> float:
    return price_book.parse(limit) if isinstance(limit, str) else limit


def _price(subject: CheckedScenario) -> Iterator[Problem]:
    whole: Any = subject.spec.expect
    if whole.cost is not None:
        for name, pool in subject.spec.pools.items():
            if not pool.instance_type:
                message = f"What it costs cannot be known: the pool '{name}' has no instance type."
                yield Problem(("expect", "cost"), message, "Give it one, such as m7i.large.")


_CHECKS: tuple[tuple[Callable[[CheckedScenario], Iterator[Problem]], tuple[Loc, ...]], ...] = (
    (_pools, ()),
    (_stages, ()),
    (_joins, (("arrivals",),)),
    (_arrivals, ()),
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
    """Scenario that is part of the package. `teaches` comes from its own text."""

    name: str
    teaches: str
    path: Path


def names() -> list[str]:
    """Return the sorted names of the shipped scenarios."""
    return sorted(path.stem for path in installation.folder(FOLDER).glob(f"*{SUFFIX}"))


def shipped_scenarios() -> list[ShippedScenario]:
    """Return the shipped scenarios, sorted by name."""
    found = []
    for name in names():
        path = installation.folder(FOLDER) / f"{name}{SUFFIX}"
        found.append(ShippedScenario(name, lesson_of(load(path).about), path))
    return found


def lesson_of(about: str) -> str:
    """Return the rest of the sentence that starts with "It teaches", up to a colon, or else the
    first sentence.
    """
    text = " ".join(about.split())
    text = text.partition(_TEACHES)[2] or text
    return text.partition(". ")[0].partition(": ")[0].rstrip(".")


def find(text: str) -> Path:
    """Return the path of the scenario that `text` names: a file or a shipped scenario."""
    if handler_lookup.is_file(Path(text)) or "/" in text or text.endswith((SUFFIX, ".yml")):
        return Path(text)
    known = names()
    if text not in known:
        raise UsageError(f"There is no scenario {text!r}.", remedy=suggest(text, known, "shipped scenarios"))
    return installation.folder(FOLDER) / f"{text}{SUFFIX}"


def load(path: Path) -> Scenario:
    """Read and check a scenario. Raise JobFileErrors with all mistakes."""
    path = handler_lookup.absolute(path)
    return parse(yaml_source.text_of(path, SHAPE.what, _REMEDY), path)


def parse(text: str, path: Path) -> Scenario:
    """Parse and check the text of a scenario file. Raise JobFileErrors with all mistakes."""
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
    maker = build.ScenarioBuilder(structure, path.parent)
    jobs: dict[str, JobTemplate] = {name: maker.job(name, one) for name, one in spec.jobs.items()}
    arrivals: list[Source | None] = [maker.source(i, one) for i, one in enumerate(spec.arrivals)]
    scenario = Scenario(
        name=spec.name,
        about=spec.about.strip(),
        jobs=jobs,
        arrivals=tuple(arrival for arrival in arrivals if arrival is not None),
        pools=build.pools(spec),
        seed=spec.seed,
        policy=build.policy(spec),
        prewarm=build.prewarm(spec),
        faults=build.faults(spec),
        expect=build.expectations(spec),
        zones=spec.zones,
        compress=spec.compress,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        path=path,
    )
    return scenario, [*maker.problems, *find_problems(structure, jobs)]
