"""Pydantic models of the scenario file: meaning, unit, and default of each key.

The published JSON Schema, the reference page, and the checks come from these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, create_model

from batchlab.core.model import Json
from batchlab.jobs import field_types
from batchlab.jobs.schema import Keys, schema_of
from batchlab.jobs.validation import Shape
from batchlab.jobs.yaml_source import Loc, is_any_of
from batchlab.scenarios.model.schema_distributions import (
    Amount,
    Moments,
    MonthEndSpec,
    Of,
    OnOffSpec,
    PoissonSpec,
    ProfileSpec,
    RampSpec,
    Share,
    StepSpec,
)
from batchlab.scenarios.model.schema_jobs import JobSpec, TraceSpec
from batchlab.scenarios.model.values import FaultName
from batchlab.scenarios.verdicts import MEASURES, Unit

N = TypeVar("N")


class ArrivalSpec(Keys):
    """Source of jobs: `job` and exactly one of the other keys."""

    job: field_types.Name | None = Field(
        default=None,
        description="Name of the job that arrives. Only a trace whose records name it may omit this key.",
        examples=["claims"],
    )
    at: Moments | None = Field(
        default=None,
        description="Fixed times: one or several, each a time from the scenario's start or `{at: TIME, count: N}`.",
        examples=[["0s", "1h", {"at": "2h", "count": 50}]],
    )
    poisson: PoissonSpec | None = Field(
        default=None, description="Independent arrivals at one rate.", examples=[{"per_hour": 30, "until": "8h"}]
    )
    on_off: OnOffSpec | None = Field(
        default=None,
        description="Bursts with pauses between them.",
        examples=[{"per_hour": 120, "on": "5m", "off": "25m", "until": "8h"}],
    )
    profile: ProfileSpec | None = Field(
        default=None,
        description="A rate for each hour of the day and each day of the week.",
        examples=[{"daily": [2] * 24, "until": "7d"}],
    )
    month_end: MonthEndSpec | None = Field(
        default=None,
        description="A calendar profile with more jobs at the turn of a month.",
        examples=[{"per_hour": 2, "begins": "2026-01-26", "until": "7d"}],
    )
    step: StepSpec | None = Field(
        default=None,
        description="A rate that changes at given times.",
        examples=[{"per_hour": 10, "steps": [{"at": "1h", "per_hour": 120}], "until": "2h"}],
    )
    ramp: RampSpec | None = Field(
        default=None,
        description="A rate that changes linearly.",
        examples=[{"per_hour": 0, "to_per_hour": 120, "until": "2h"}],
    )
    trace: TraceSpec | None = Field(
        default=None,
        description="A recorded trace.",
        examples=[{"file": "last-month.csv", "columns": {"at": "submit"}}],
    )


SOURCES = tuple(name for name in ArrivalSpec.model_fields if name != "job")
"""Keys that name a source of arrivals."""


class PoolSpec(Keys):
    """A pool of workers."""

    min: int = Field(default=0, ge=0, le=100_000, description="Minimum number of instances.", examples=[2])
    max: int = Field(ge=1, le=100_000, description="Maximum number of instances.", examples=[40])
    slots: int = Field(default=1, ge=1, le=9999, description="Task slots of an instance.", examples=[4])
    boot: field_types.Duration = Field(
        default=0.0, description="Time from an instance's launch until it takes work.", examples=["90s"]
    )
    instance_type: str = Field(
        default="", description="EC2 instance type, which determines the cost.", examples=["m7i.large"]
    )
    spot: Share = Field(default=0.0, description="Share of Spot Instances.", examples=[0.5])


class PolicySpec(Keys):
    """Scaling policy of the fleet."""

    drain_target: field_types.Timeout | None = Field(
        default=None,
        description="The fleet is sized so that the backlog would be done within this time.",
        examples=["10m"],
    )
    cooldown_in: field_types.Duration | None = Field(
        default=None, description="Time for which demand must be lower before the fleet shrinks.", examples=["2m"]
    )
    idle: field_types.Duration | None = Field(
        default=None,
        description="Time for which an instance must be idle before it may be terminated.",
        examples=["1m"],
    )


class PrewarmSpec(Keys):
    """Scheduled capacity: a minimum number of instances for some time."""

    pool: field_types.Name = Field(default="default", description="Name of the pool.", examples=["default"])
    min: int = Field(ge=0, le=100_000, description="Minimum number of instances in this time.", examples=[10])
    at_s: field_types.Duration = Field(alias="at", description="Start time.", examples=["7h"])
    until_s: field_types.Duration = Field(alias="until", description="End time.", examples=["9h"])


class FaultSpec(Keys):
    """A fault. Two lasting faults of the same kind must not overlap, unless they are pauses of two
    pools: the end of the first would also end the second.
    """

    at_s: field_types.Duration = Field(alias="at", description="Start time of the fault.", examples=["30m"])
    fault: Literal[
        "kill",
        "pause",
        "partition",
        "spot-wave",
        "zone-loss",
        "s3-errors",
        "sqs-duplicates",
        "sqs-delays",
        "slow-disk",
        "manager-crash",
        "database-loss",
    ] = Field(
        description="What breaks: " + "; ".join(f"`{name.value}`: {name.meaning}" for name in FaultName) + ".",
        examples=["kill"],
    )
    for_s: field_types.Duration = Field(
        alias="for", default=60.0, description="Duration of a fault that lasts.", examples=["5m"]
    )
    pool: field_types.Name | None = Field(
        default=None, description="Pool whose instances the fault hits. The default is all pools.", examples=["default"]
    )
    share: Share | None = Field(
        default=None,
        description="Share of the instances in service that the fault hits, rounded up. The default is all.",
        examples=[0.5],
    )
    count: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Number of instances that the fault hits, instead of a share.",
        examples=[2],
    )
    rate: Share | None = Field(
        default=None,
        description="Share of requests or messages that `s3-errors`, `sqs-duplicates`, and `sqs-"
        "delays` hit. The default is 0.2.",
        examples=[0.2],
    )
    notice: field_types.Duration | None = Field(
        default=None,
        description="Notice of a Spot Instance before its end. The default is two minutes.",
        examples=["2m"],
    )
    zone: str | None = Field(
        default=None, description="Letter of the lost zone: `a`, `b`, and so on. The default is `a`.", examples=["b"]
    )


class Bound(Of[N], Generic[N]):
    """Range of a measure. A value alone is the maximum."""

    least: N | None = Field(default=None, description="Minimum value.", examples=[0])
    most: N | None = Field(default=None, description="Maximum value.", examples=[0])


def _bound(value: Any) -> Any:
    return value if isinstance(value, dict | list) else {"most": value}


_FORMS: dict[Unit, tuple[Any, Any]] = {
    Unit.SECONDS: (field_types.Duration, "10m"),
    Unit.USD: (field_types.Cost, "12 USD"),
    Unit.NUMBER: (Amount, 0),
    Unit.SHARE: (Share, 0.2),
}


def _expected(by_template: bool) -> dict[str, Any]:
    """Return a field for each measure."""
    found: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        if by_template and not measure.by_template:
            continue
        form, example = _FORMS[measure.unit]
        bound: Any = Bound[form]  # type: ignore[valid-type]
        limit = Annotated[bound | None, BeforeValidator(_bound, json_schema_input_type=form | bound)]
        says = f"{measure.meaning[0].upper()}{measure.meaning[1:]}."
        found[name] = (limit, Field(default=None, description=says, examples=[example]))
    return found


class _JobExpect(Keys):
    """Expectations for the jobs of one template."""


class _Expect(Keys):
    """Expectations: measures, each with its maximum or with `{least: , most: }`."""


JobExpectSpec = create_model("JobExpectSpec", __base__=_JobExpect, __doc__=_JobExpect.__doc__, **_expected(True))
ExpectSpec = create_model(
    "ExpectSpec",
    __base__=_Expect,
    __doc__=_Expect.__doc__,
    **_expected(False),
    jobs=(
        dict[str, JobExpectSpec],  # type: ignore[valid-type]
        Field(
            default_factory=dict,
            description="Expectations for the jobs of one template, by its name.",
            examples=[{"claims": {"p95_turnaround": "2h"}}],
        ),
    ),
)


class ScenarioSpec(Keys):
    """The scenario as a whole."""

    name: field_types.Name = Field(
        description="Name of the scenario: lower case letters, digits, `-` and `_`, at most 40 characters.",
        examples=["claims-month-end"],
    )
    about: str = Field(
        min_length=1,
        description="Description of the scenario and of its lesson, in one or two paragraphs.",
        examples=["The last night of a month."],
    )
    seed: int = Field(default=1, ge=0, description="Seed of all random values.", examples=[7])
    compress: Annotated[float, Field(ge=1, le=1_000_000)] = Field(
        default=1.0, description="Factor by which a replay divides all times by default.", examples=[60]
    )
    zones: int = Field(default=1, ge=1, le=6, description="Availability zones that the fleet uses.", examples=[2])
    jobs: dict[field_types.Name, JobSpec] = Field(
        min_length=1, description="The job templates, by name.", examples=[{"claims": {"tasks": 200, "task": "4s"}}]
    )
    arrivals: list[ArrivalSpec] = Field(
        min_length=1, description="Sources of jobs.", examples=[[{"job": "claims", "at": "0s"}]]
    )
    pools: dict[field_types.Name, PoolSpec] = Field(
        min_length=1, description="Pools of the fleet, by name.", examples=[{"default": {"max": 10}}]
    )
    policy: PolicySpec = Field(
        default_factory=PolicySpec,
        description="Scaling policy. Settings that are not given are as in a deployment.",
        examples=[{"drain_target": "10m"}],
    )
    prewarm: list[PrewarmSpec] = Field(
        default_factory=list,
        description="Scheduled capacity before the work arrives.",
        examples=[[{"min": 10, "at": "7h", "until": "9h"}]],
    )
    faults: list[FaultSpec] = Field(
        default_factory=list,
        description="Faults and their times.",
        examples=[[{"at": "30m", "fault": "kill", "count": 2}]],
    )
    expect: ExpectSpec = Field(  # type: ignore[valid-type]
        default_factory=ExpectSpec,
        description="Expectations for the verdict on a run.",
        examples=[{"lost": 0, "p95_wait": "10m"}],
    )


SHAPE = Shape(
    ScenarioSpec,
    "scenario",
    "Write name:, about:, jobs:, arrivals: and pools:.",
    {
        "name": "unnamed",
        "about": "-",
        "jobs": {"-": {"task": 1}},
        "arrivals": [{"at": 0}],
        "pools": {"default": {"max": 1}},
        "max": 100_000,
        "min": 0,
        "file": "-",
        "by": "-",
        "fault": "kill",
        "begins": "2026-01-01",
        "daily": [1] * 24,
        "steps": [{"at": 0, "per_hour": 1}],
        "columns": ["-"],
        **dict.fromkeys(("at", "from", "per_hour", "to_per_hour", "on", "off", "task"), 1),
        **dict.fromkeys(("least", "most", "mean", "median", "sigma", "scale", "shape"), 1),
        **dict.fromkeys(("alpha", "weight", "until"), 2),
    },
)

_TEXT_PLACES: tuple[Loc, ...] = (
    ("name",),
    ("about",),
    ("jobs", "*", "file"),
    ("jobs", "*", "tenant"),
    ("jobs", "*", "stages", "*", "name"),
    ("jobs", "*", "stages", "*", "pool"),
    ("jobs", "*", "stages", "*", "after"),
    ("jobs", "*", "stages", "*", "after", "*"),
    ("jobs", "*", "stages", "*", "gather", "by"),
    ("jobs", "*", "stages", "*", "retry", "exceptions", "*"),
    ("arrivals", "*", "job"),
    ("arrivals", "*", "trace", "file"),
    ("arrivals", "*", "trace", "names", "*"),
    *(
        ("arrivals", "*", "trace", "columns", key)
        for key in ("at", "minus", "unit", "count", "tasks", "task_s", "label", "tenant", "job")
    ),
    ("arrivals", "*", "month_end", "begins"),
    ("arrivals", "*", "month_end", "holidays", "*"),
    ("pools", "*", "instance_type"),
    ("prewarm", "*", "pool"),
    ("faults", "*", "pool"),
    ("faults", "*", "zone"),
)


def is_text(loc: Loc) -> bool:
    """Return whether a scalar at `loc` is always text."""
    return is_any_of(loc, _TEXT_PLACES)


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the scenario file, for editors."""
    return schema_of(ScenarioSpec, "batchlab scenario")
