"""Scenario files: finding one, loading it, and listing those that are shipped.

Invariant: a Scenario that was loaded has passed every check, and follows from nothing but the
file's text and its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchlab.core import package_data
from batchlab.core.errors import UsageError
from batchlab.jobs import paths, yaml_source
from batchlab.jobs.validation import Structure, validate
from batchlab.jobs.yaml_source import Problem, suggest
from batchlab.scenarios.model import build, checks
from batchlab.scenarios.model.schema import SHAPE, ScenarioSpec, is_text
from batchlab.scenarios.model.values import JobTemplate, Scenario, Source

FOLDER = "scenarios"
SUFFIX = ".yaml"
_TEACHES = "It teaches "
_REMEDY = "Write its path, or the name of one that `batchlab scenario list` shows."


@dataclass(frozen=True, slots=True)
class ShippedScenario:
    """A scenario that comes with batchlab, and what it teaches by its own prose."""

    name: str
    teaches: str
    path: Path


def names() -> list[str]:
    """The names of the shipped scenarios, sorted."""
    return sorted(path.stem for path in package_data.folder(FOLDER).glob(f"*{SUFFIX}"))


def shipped_scenarios() -> list[ShippedScenario]:
    """The shipped scenarios by name."""
    found = []
    for name in names():
        path = package_data.folder(FOLDER) / f"{name}{SUFFIX}"
        found.append(ShippedScenario(name, lesson_of(load(path).about), path))
    return found


def lesson_of(about: str) -> str:
    """The rest of the first sentence of `about` that says what it teaches, without what explains
    it after a colon; else its first sentence."""
    text = " ".join(about.split())
    text = text.partition(_TEACHES)[2] or text
    return text.partition(". ")[0].partition(": ")[0].rstrip(".")


def find(text: str) -> Path:
    """The scenario that `text` names: a file, or the name of a shipped one; UsageError."""
    if paths.is_file(Path(text)) or "/" in text or text.endswith((SUFFIX, ".yml")):
        return Path(text)
    known = names()
    if text not in known:
        raise UsageError(
            f"There is no scenario {text!r}.", remedy=suggest(text, known, "shipped scenarios")
        )
    return package_data.folder(FOLDER) / f"{text}{SUFFIX}"


def load(path: Path) -> Scenario:
    """Read and check the scenario at `path`; JobFileErrors with every mistake there is."""
    path = paths.absolute(path)
    return parse(yaml_source.text_of(path, SHAPE.what, _REMEDY), path)


def parse(text: str, path: Path) -> Scenario:
    """The scenario whose file at `path` has that text; JobFileErrors as in `load`."""
    document = yaml_source.parse(text, is_text)
    if isinstance(document.data, dict) and {"input", "stages"} <= document.data.keys():
        raise yaml_source.another(
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
        arrivals=tuple(one for one in arrivals if one is not None),
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
    return scenario, [*maker.problems, *checks.find_problems(structure, jobs)]
