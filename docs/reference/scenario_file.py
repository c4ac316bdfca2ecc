"""Reference page of the scenario file, made from its JSON Schema."""

from __future__ import annotations

from batchlab.core import text
from batchlab.scenarios.model.schema import json_schema
from docs.reference import job_file

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
<!-- Made from batchlab/scenarios/model/schema.py.
     To make it again: python -m docs.reference docs -->

# The scenario file

A scenario file is one YAML mapping. A scenario defines who submits which jobs at which times, the
fleet that runs the jobs, the faults that occur, and the expected results.
[Scenarios](scenarios.md) is the guide to scenarios. This page describes every key.

- A duration is {text.DURATION_FORMS}. All times are durations after the start of the scenario.
- A size is {text.SIZE_FORMS}.
- Money is in US dollars: `12 USD`.
- A distribution of numbers has the same keys as a distribution of durations, with numbers as values.
- `retry` has the same keys as in a [job file](job-file.md).
- A scenario file is YAML 1.2, like a job file: a mapping may not repeat a key, and anchors and `<<`
  work.
"""


def parts() -> set[str]:
    """The schema's parts that the page shows."""
    return set(_SECTIONS)


def reference() -> str:
    """The reference page in Markdown."""
    schema = json_schema()
    pages = [_HEAD, job_file.section("The scenario", schema)]
    pages += [job_file.section(title, schema["$defs"][name]) for name, title in _SECTIONS.items()]
    return "\n".join(pages)
