"""Pydantic models of the scenario file: meaning, unit, and default of each key.

The published JSON Schema, the reference page, and the checks come from the models in this module.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from batchlab.core import text
from batchlab.core.model import Json
from batchlab.jobs import field_types
from batchlab.jobs.schema import After, Bundle, Keys, Memory, Pool, Priority, Retry, Slots, StageName, schema_of
from batchlab.jobs.validation import Shape
from batchlab.jobs.yaml_source import Loc, is_any_of
from batchlab.scenarios.model.schema_distributions import (
    Amount,
    JobTimes,
    Moments,
    MonthEndSpec,
    Numbers,
    Of,
    OnOffSpec,
    PoissonSpec,
    ProfileSpec,
    RampSpec,
    Share,
    StepSpec,
    Times,
    key,
)
from batchlab.scenarios.model.values import FaultName
from batchlab.scenarios.traces.rows import check_unit
from batchlab.scenarios.verdicts import MEASURES, Unit


def _gather(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        remedy = "Write 'all', or {by: key, groups: 12}."
        raise field_types.refusal(f"gather cannot be '{value}'.", remedy)
    return {"by": "*"} if value == "all" else value


class GroupsSpec(Keys):
    """Fan-in: `gather: all` makes one task of all results; this makes one for each group."""

    by: str = key("Name of the field by which results are grouped.", "region", min_length=1)
    groups: int = key("Number of groups.", 12, 1, ge=1, le=1_000_000)


class StageSpec(Keys):
    """A step of a job."""

    name: StageName
    task: Times = key("Time of a task: a duration, or a distribution of durations.", "4s")
    after: After = None
    gather: Annotated[
        GroupsSpec | None, BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GroupsSpec)
    ] = key(
        "Wait for every task before: `all` makes one task of all their results, "
        "`{by: NAME, groups: N}` one for each group. Without it each result becomes a task of "
        "this stage as soon as it is there.",
        "all",
        None,
    )
    kind: Literal["sleep", "cpu", "memory", "io"] = key(
        "Work of a stand-in in a replay while its time passes.", "cpu", "sleep"
    )
    slots: Slots = 1
    memory: Memory = None
    bundle: Bundle = None
    pool: Pool = "default"
    retry: Retry
    fails: Share = key("Share of all attempts that end in an exception.", 0.01, 0.0)
    poison: int = key(
        "The first tasks of each job, in this number, kill their worker whenever they run.", 2, 0, ge=0, le=9999
    )


class JobSpec(Keys):
    """A job template. `task`, `stages`, or `file` describes its work."""

    tasks: Numbers | None = key(
        "Number of root tasks: a number, or a distribution of numbers, which are "
        "rounded. The default is 1. A trace may have a number for each job.",
        200,
        None,
    )
    task: JobTimes | None = key(
        "How long a task takes, where the job is a single stage (which is then named "
        "`work`). With `file`, a mapping of the job file's stages to how long their tasks take, or "
        "one duration for all of them.",
        "4s",
        None,
    )
    stages: list[StageSpec] | None = key("The steps, in order.", [{"name": "parse", "task": "4s"}], None, min_length=1)
    file: str | None = key(
        "A job file, relative to the scenario, whose real work a replay does. A forecast takes the times in `task`.",
        "../examples/claims/job.yaml",
        None,
        min_length=1,
    )
    groups: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = key(
        "With `file`: number of groups of each stage that gathers by a field. The default is 1.",
        {"total": 12},
        default_factory=dict,
    )
    deadline: field_types.Timeout | None = key(
        "Time from a job's arrival to its deadline. Jobs have none by default.", "6h", None
    )
    tenant: str = key("Tenant of the job.", "payer-a", "")
    priority: Priority = 0
    max_failures: int = key(
        "Number of failed tasks that a job may have. With `file`, 0 means its limit.", 5, 0, ge=0, le=10**12
    )

    @model_validator(mode="before")
    @classmethod
    def _by_stage(cls, data: Any) -> Any:
        """With a job file, treat a mapping in `task` as stages, not as a distribution."""
        if isinstance(data, dict) and "file" in data and isinstance(data.get("task"), dict):
            return {**data, "task": {"by_stage": data["task"]}}
        return data


_UNIT = "Write s, ms, us, ns, or for example '%d/%b/%Y:%H:%M:%S %z'."


def _per(value: Any) -> Any:
    try:
        number = float(text.size_bytes(value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError) as error:
        what = f"{text.shown(value)} is neither a number nor a size."
        raise field_types.refusal(what, "Write for example 1000 or 64 MiB.") from error
    if not 0 < number < float("inf"):
        raise field_types.refusal("It must be above 0.", "Write for example 1000 or 64 MiB.")
    return number


def _unit(value: Any) -> Any:
    if isinstance(value, str):
        try:
            check_unit(value)
        except ValueError as error:
            what = str(error)
            raise field_types.refusal(f"{what[0].upper()}{what[1:]}.", _UNIT) from error
    return value


def _delimiter(value: Any) -> Any:
    if value == r"\t":
        return "\t"
    if isinstance(value, str) and (len(value) != 1 or value in '"\r\n'):
        what = f"{text.shown(value)} cannot be between fields."
        raise field_types.refusal(what, r"Write one character, such as ';' or '\t'.")
    return value


def _take(value: Any) -> Any:
    return value if isinstance(value, dict) else {"columns": value}


class TakeSpec(Keys):
    """A number of a record: the sum of some columns, divided by a constant."""

    columns: field_types.OneOrMany = key("Columns whose values are added.", "duration_ms", min_length=1)
    per: Annotated[
        float, BeforeValidator(_per), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
    ] = key("What that is divided by: a number, or a size where bytes become tasks.", "64 MiB", 1.0)


Taken = Annotated[TakeSpec, BeforeValidator(_take, json_schema_input_type=str | list[str] | TakeSpec)]


class ColumnsSpec(Keys):
    """Column map: names from a table's header, fields of the Standard Workload Format, or keys of a JSON object, with
    dots for nested objects. Columns that a format defines may be omitted.
    """

    at: str | None = key("Arrival time: a number or a timestamp.", "end", None)
    minus: str = key("Seconds before `at` that it arrived, in traces that note ends.", "duration", "")
    unit: Annotated[str, BeforeValidator(_unit)] = key(
        "What `at` counts in, `s`, `ms`, `us` or `ns`; or the strptime format of its "
        "timestamps, where they are not ISO 8601.",
        "ms",
        "s",
    )
    count: str = key(
        "How many jobs arrive from `at` on until the next record, where a record is an interval and no job.",
        "value",
        "",
    )
    every: field_types.Timeout | None = key(
        "With `count`: length of an interval. The default is the most common one.", "5m", None
    )
    scale: float = key("With `count`: factor of the counts.", 0.1, 1.0, gt=0, le=field_types.MAX_TASKS)
    tasks: Taken | None = key(
        "How many tasks a job has: a column, several that are added, or `{columns: , per: }`. It is rounded up.",
        {"columns": ["input", "shuffle"], "per": "64 MiB"},
        None,
    )
    task_s: Taken | None = key("Seconds of each root task, in the same forms as `tasks`.", "run", None)
    label: str = key("Name of the job.", "job", "")
    tenant: str = key("Tenant of the job.", "user", "")
    job: str = key("Name of the scenario's job, if the arrival does not name it.", "kind", "")


class TraceSpec(Keys):
    """A recorded trace of arrivals."""

    file: str = key(
        "The trace, relative to the scenario; gzip is unpacked, whatever its name is.", "last-month.csv", min_length=1
    )
    format: Literal["swf", "table", "jsonl"] | None = key(
        "The Standard Workload Format, a table of text, or JSON Lines such as a "
        "record. The default is derived from the file's name.",
        "swf",
        None,
    )
    columns: ColumnsSpec | None = key("Column map. A table needs it.", {"at": "submit"}, None)
    names: list[str] = key(
        "Names of a table's columns, if its first line has none.", ["job", "submit", "run"], default_factory=list
    )
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = key(
        "Separator of a table's fields. The default is derived from the first line.", ";", ""
    )
    from_s: field_types.Duration = key(
        "Time after the trace's first job before which records are left out.", "6h", 0.0, alias="from"
    )
    until_s: field_types.Duration | None = key(
        "Time after the trace's first job from which records are left out.", "8h", None, alias="until"
    )
    limit: int | None = key("Maximum number of jobs.", 1000, None, ge=1)
    starts_s: field_types.Duration = key("Time in the scenario at which the trace starts.", "1h", 0.0, alias="starts")


N = TypeVar("N")


class ArrivalSpec(Keys):
    """Source of jobs: `job` and exactly one of the other keys."""

    job: field_types.Name | None = key(
        "Name of the job that arrives. Only a trace whose records name it may omit this key.", "claims", None
    )
    at: Moments | None = key(
        "Fixed times: one or several, each a time from the scenario's start or `{at: TIME, count: N}`.",
        ["0s", "1h", {"at": "2h", "count": 50}],
        None,
    )
    poisson: PoissonSpec | None = key("Independent arrivals at one rate.", {"per_hour": 30, "until": "8h"}, None)
    on_off: OnOffSpec | None = key(
        "Bursts with pauses between them.", {"per_hour": 120, "on": "5m", "off": "25m", "until": "8h"}, None
    )
    profile: ProfileSpec | None = key(
        "A rate for each hour of the day and each day of the week.", {"daily": [2] * 24, "until": "7d"}, None
    )
    month_end: MonthEndSpec | None = key(
        "A calendar profile with more jobs at the turn of a month.",
        {"per_hour": 2, "begins": "2026-01-26", "until": "7d"},
        None,
    )
    step: StepSpec | None = key(
        "A rate that changes at given times.",
        {"per_hour": 10, "steps": [{"at": "1h", "per_hour": 120}], "until": "2h"},
        None,
    )
    ramp: RampSpec | None = key(
        "A rate that changes linearly.", {"per_hour": 0, "to_per_hour": 120, "until": "2h"}, None
    )
    trace: TraceSpec | None = key("A recorded trace.", {"file": "last-month.csv", "columns": {"at": "submit"}}, None)


SOURCES = tuple(name for name in ArrivalSpec.model_fields if name != "job")
"""Keys that name a source of arrivals."""


class PoolSpec(Keys):
    """A pool of workers."""

    min: int = key("Minimum number of instances.", 2, 0, ge=0, le=100_000)
    max: int = key("Maximum number of instances.", 40, ge=1, le=100_000)
    slots: int = key("Task slots of an instance.", 4, 1, ge=1, le=9999)
    boot: field_types.Duration = key("Time from an instance's launch until it takes work.", "90s", 0.0)
    instance_type: str = key("EC2 instance type, which determines the cost.", "m7i.large", "")
    spot: Share = key("Share of Spot Instances.", 0.5, 0.0)


class PolicySpec(Keys):
    """Scaling policy of the fleet."""

    drain_target: field_types.Timeout | None = key(
        "The fleet is sized so that the backlog would be done within this time.", "10m", None
    )
    cooldown_in: field_types.Duration | None = key(
        "Time for which demand must be lower before the fleet shrinks.", "2m", None
    )
    idle: field_types.Duration | None = key(
        "Time for which an instance must be idle before it may be terminated.", "1m", None
    )


class PrewarmSpec(Keys):
    """Scheduled capacity: a minimum number of instances for some time."""

    pool: field_types.Name = key("Name of the pool.", "default", "default")
    min: int = key("Minimum number of instances in this time.", 10, ge=0, le=100_000)
    at_s: field_types.Duration = key("Start time.", "7h", alias="at")
    until_s: field_types.Duration = key("End time.", "9h", alias="until")


class FaultSpec(Keys):
    """A fault. Two lasting faults of the same kind must not overlap, unless they are pauses of two pools: the end of
    the first would also end the second.
    """

    at_s: field_types.Duration = key("Start time of the fault.", "30m", alias="at")
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
    ] = key("What breaks: " + "; ".join(f"`{name.value}`: {name.meaning}" for name in FaultName) + ".", "kill")
    for_s: field_types.Duration = key("Duration of a fault that lasts.", "5m", 60.0, alias="for")
    pool: field_types.Name | None = key(
        "Pool whose instances the fault hits. The default is all pools.", "default", None
    )
    share: Share | None = key(
        "Share of the instances in service that the fault hits, rounded up. The default is all.", 0.5, None
    )
    count: int | None = key("Number of instances that the fault hits, instead of a share.", 2, None, ge=1, le=100_000)
    rate: Share | None = key(
        "Share of requests or messages that `s3-errors`, `sqs-duplicates`, and `sqs-delays` hit. The default is 0.2.",
        0.2,
        None,
    )
    notice: field_types.Duration | None = key(
        "Notice of a Spot Instance before its end. The default is two minutes.", "2m", None
    )
    zone: str | None = key("Letter of the lost zone: `a`, `b`, and so on. The default zone is `a`.", "b", None)


class Bound(Of[N], Generic[N]):
    """Range of a measure. A value alone is the maximum."""

    least: N | None = key("Minimum value.", 0, None)
    most: N | None = key("Maximum value.", 0, None)


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
    fields: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        if by_template and not measure.by_template:
            continue
        form, example = _FORMS[measure.unit]
        bound: Any = Bound[form]  # type: ignore[valid-type]
        limit = Annotated[bound | None, BeforeValidator(_bound, json_schema_input_type=form | bound)]
        says = f"{measure.meaning[0].upper()}{measure.meaning[1:]}."
        fields[name] = (limit, key(says, example, None))
    return fields


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
        key(
            "Expectations for the jobs of one template, by its name.",
            {"claims": {"p95_turnaround": "2h"}},
            default_factory=dict,
        ),
    ),
)


class ScenarioSpec(Keys):
    """The scenario as a whole."""

    name: field_types.Name = key(
        "Name of the scenario: lower case letters, digits, `-` and `_`, at most 40 characters.", "claims-month-end"
    )
    about: str = key(
        "Description of the scenario and of its lesson, in one or two paragraphs.",
        "The last night of a month.",
        min_length=1,
    )
    seed: int = key("Seed of all random values.", 7, 1, ge=0)
    compress: Annotated[float, Field(ge=1, le=1_000_000)] = key(
        "Factor by which a replay divides all times by default.", 60, 1.0
    )
    zones: int = key("Availability zones that the fleet uses.", 2, 1, ge=1, le=6)
    jobs: dict[field_types.Name, JobSpec] = key(
        "The job templates, by name.", {"claims": {"tasks": 200, "task": "4s"}}, min_length=1
    )
    arrivals: list[ArrivalSpec] = key("Sources of jobs.", [{"job": "claims", "at": "0s"}], min_length=1)
    pools: dict[field_types.Name, PoolSpec] = key(
        "Pools of the fleet, by name.", {"default": {"max": 10}}, min_length=1
    )
    policy: PolicySpec = key(
        "Scaling policy. Settings that are not given are as in a deployment.",
        {"drain_target": "10m"},
        default_factory=PolicySpec,
    )
    prewarm: list[PrewarmSpec] = key(
        "Scheduled capacity before the work arrives.", [{"min": 10, "at": "7h", "until": "9h"}], default_factory=list
    )
    faults: list[FaultSpec] = key(
        "Faults and their times.", [{"at": "30m", "fault": "kill", "count": 2}], default_factory=list
    )
    expect: ExpectSpec = key(  # type: ignore[valid-type]
        "Expectations for the verdict on a run.", {"lost": 0, "p95_wait": "10m"}, default_factory=ExpectSpec
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
    """Return whether a scalar at the location `loc` is always read as text."""
    return is_any_of(loc, _TEXT_PLACES)


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the scenario file, for editors."""
    return schema_of(ScenarioSpec, "batchlab scenario")
