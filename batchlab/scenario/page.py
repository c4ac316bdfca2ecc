"""The JSON Schema of the scenario file, and the reference page made from it.

Invariant: the page says nothing about a key that the models do not say.
"""

from __future__ import annotations

from batchlab.model import Json
from batchlab.scenario.schema import ScenarioSpec
from batchlab.spec import page, units

_SECTIONS = {
    "JobSpec": "`jobs`: each one",
    "StageSpec": "`stages` of a job: each one",
    "GroupsSpec": "`gather` of a stage",
    "DrawTimes": "Distributions",
    "UniformTimes": "`uniform`",
    "ExponentialTimes": "`exponential`",
    "LognormalTimes": "`lognormal`",
    "ParetoTimes": "`pareto`",
    "WeibullTimes": "`weibull`",
    "PartTimes": "`mixture`: each part",
    "ArrivalSpec": "`arrivals`: each one",
    "MomentSpec": "`at` of an arrival: each moment",
    "PoissonSpec": "`poisson`",
    "OnOffSpec": "`on_off`",
    "ProfileSpec": "`profile`",
    "MonthEndSpec": "`month_end`",
    "StepSpec": "`step`",
    "StepAt": "`steps` of `step`: each one",
    "RampSpec": "`ramp`",
    "TraceSpec": "`trace`",
    "ColumnsSpec": "`columns` of a trace",
    "TakeSpec": "A number of a trace's record",
    "PoolSpec": "`pools`: each one",
    "PolicySpec": "`policy`",
    "PrewarmSpec": "`prewarm`: each one",
    "FaultSpec": "`faults`: each one",
    "ExpectSpec": "`expect`",
    "JobExpectSpec": "`jobs` of `expect`: each one",
    "BoundTimes": "A bound",
}
"""Titles of the schema's parts, in the order of the page."""

_HEAD = f"""\
<!-- Made from batchlab/scenario/schema.py. To make it again:
     python -c "import batchlab.scenario.page as p; print(p.reference(), end='')" \
> docs/scenario-file.md -->

# The scenario file

A scenario is one YAML mapping: who submits what and when, to which fleet, what breaks meanwhile,
and what must hold. [Scenarios](scenarios.md) is the guide to it; this page has every key.

- A duration is {units.DURATION_FORMS}. All times count from the scenario's beginning.
- A size is {units.SIZE_FORMS}.
- Money is in US dollars: `12 USD`.
- A distribution of numbers has the keys of one of durations, with numbers in place of durations.
- `retry` is that of a [job file](job-file.md).
- The file is YAML 1.2, read as a job file is: keys may not repeat, anchors and `<<` work.
"""


def json_schema() -> dict[str, Json]:
    """JSON Schema (draft 2020-12) of the scenario file, for editors."""
    return page.schema_of(ScenarioSpec, "batchlab scenario")


def parts() -> set[str]:
    """The schema's parts that the page shows."""
    return set(_SECTIONS)


def reference() -> str:
    """The reference page in Markdown."""
    schema = json_schema()
    pages = [_HEAD, page.section("The scenario", schema)]
    pages += [page.section(title, schema["$defs"][name]) for name, title in _SECTIONS.items()]
    return "\n".join(pages)
