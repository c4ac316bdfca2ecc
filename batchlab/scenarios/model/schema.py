"""Pydantic models of the scenario file: meaning, unit, and default of each key.

The published JSON Schema, the reference page, and the checks come from the models in this module.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from batchlab.core import fair_share, text
from batchlab.core.job_definition import MAX_DEPENDENCIES, MAX_GPUS
from batchlab.core.model import Json
from batchlab.jobs import field_types
from batchlab.jobs.schema import (
    After,
    Bundle,
    Gpus,
    JobShare,
    Keys,
    Memory,
    Pool,
    Priority,
    Retry,
    Slots,
    StageName,
    schema_of,
)
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
    """Fan-in by a field: one task for each of N groups of results."""

    by: str = key("Field by which the results of the previous stages are grouped.", "region", min_length=1)
    groups: int = key("Number of groups.", 12, 1, ge=1, le=1_000_000)


SpeculativeCopies = Annotated[
    bool,
    Field(
        description="Whether stragglers may get speculative copies. In a job template, the key applies to `task`. With "
        "`file`, the job file decides. Copies are off by default, because a declared run time does not "
        "depend on the worker.",
        examples=[True],
    ),
]


class StageSpec(Keys):
    """One stage of a job template."""

    name: StageName
    task: Times = key("Run time of one task.", "4s")
    after: After = None
    gather: Annotated[
        GroupsSpec | None, BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GroupsSpec)
    ] = key(
        "Fan-in: the stage waits for all tasks of the previous stages. `all` creates one task for all "
        "their results, and `{by: FIELD, groups: N}` one task for each of N groups. Without `gather`, "
        "each result becomes a task as soon as it exists.",
        "all",
        None,
    )
    kind: Literal["sleep", "cpu", "memory", "io"] = key("Work of a simulated task in a replay.", "cpu", "sleep")
    slots: Slots = 1
    gpus: Gpus = 0
    memory: Memory = None
    bundle: Bundle = None
    pool: Pool = "default"
    speculative_copies: SpeculativeCopies = False
    retry: Retry
    fails: Share = key("Share of the task attempts that end in an exception.", 0.01, 0.0)
    poison: int = key(
        "Number of tasks of each job, from the first one, that kill their worker in every attempt.", 2, 0, ge=0, le=9999
    )


class JobSpec(Keys):
    """A job template. Exactly one of `task`, `stages`, and `file` describes the work; `task` is also allowed with
    `file`.
    """

    tasks: Numbers | None = key(
        "Number of tasks in the first stage: a number, or a distribution whose values are rounded. By "
        "default 1, or the number in a trace.",
        200,
        None,
    )
    task: JobTimes | None = key(
        "Run time of one task of a job with a single stage, named `work`. With `file`, one duration "
        "for all stages, or a mapping from the name of each stage to its run time.",
        "4s",
        None,
    )
    stages: list[StageSpec] | None = key("Stages, in order.", [{"name": "parse", "task": "4s"}], None, min_length=1)
    file: str | None = key(
        "Path of a job file, relative to the scenario file. A replay does its real work; a forecast "
        "uses the run times in `task`.",
        "../examples/claims/job.yaml",
        None,
        min_length=1,
    )
    groups: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = key(
        "With `file`: number of groups of each stage that gathers results by a field. By default 1.",
        {"total": 12},
        default_factory=dict,
    )
    speculative_copies: SpeculativeCopies = False
    after: field_types.OneOrMany = key(
        "Name of another job template, or a list of names. A job begins after the latest job of this template that "
        "arrives before it or at the same time has succeeded, or with `NAME:ended`, has ended.",
        ["claims", "statements:ended"],
        default_factory=list,
        max_length=MAX_DEPENDENCIES,
    )
    deadline: field_types.Timeout | None = key(
        "Time from the arrival of a job to its deadline. By default, there is none.", "6h", None
    )
    tenant: str = key("Tenant that submits the jobs.", "payer-a", "")
    share: JobShare = None
    priority: Priority = 0
    max_failures: int = key(
        "Number of failed tasks that each job may have. With `file`, 0 means the limit in the job file.",
        5,
        0,
        ge=0,
        le=10**12,
    )

    @model_validator(mode="before")
    @classmethod
    def _by_stage(cls, data: Any) -> Any:
        """If the job template has a job file, read a mapping in `task` as task times by stage, not as a
        distribution.
        """
        if isinstance(data, dict) and "file" in data and isinstance(data.get("task"), dict):
            return {**data, "task": {"by_stage": data["task"]}}
        return data


_UNIT = "Write s, ms, us, ns, or for example '%d/%b/%Y:%H:%M:%S %z'."


def _per(value: Any) -> Any:
    try:
        number = float(text.size_bytes(value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError) as error:
        what = f"{text.show_value(value)} is neither a number nor a size."
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
        what = f"{text.show_value(value)} cannot be between fields."
        raise field_types.refusal(what, r"Write one character, such as ';' or '\t'.")
    return value


def _take(value: Any) -> Any:
    return value if isinstance(value, dict) else {"columns": value}


class TakeSpec(Keys):
    """A number from a record: the sum of some columns, divided by a constant."""

    columns: field_types.OneOrMany = key("Columns whose values are added.", "duration_ms", min_length=1)
    per: Annotated[
        float, BeforeValidator(_per), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
    ] = key(
        "Divisor: a number, or a size such as `64 MiB`, which converts bytes into a number of tasks.", "64 MiB", 1.0
    )


Taken = Annotated[TakeSpec, BeforeValidator(_take, json_schema_input_type=str | list[str] | TakeSpec)]


class ColumnsSpec(Keys):
    """Columns of the trace from which each value is taken: names from a table's header, fields of the Standard Workload
    Format, or keys of a JSON object, with dots for a nested key. Columns that the format defines may be omitted.
    """

    at: str | None = key("Arrival time of the job: a number, or a timestamp.", "end", None)
    minus: str = key(
        "Seconds to subtract from `at`, for a trace that contains the end and the duration of a job.", "duration", ""
    )
    unit: Annotated[str, BeforeValidator(_unit)] = key(
        "Unit of a number in `at`: `s`, `ms`, `us`, or `ns`; or the strptime format of a timestamp "
        "that is not in ISO 8601.",
        "ms",
        "s",
    )
    count: str = key(
        "Number of jobs that arrive in the interval from `at` to the next record, for a trace whose "
        "records are intervals.",
        "value",
        "",
    )
    every: field_types.Timeout | None = key(
        "Length of an interval. By default, the most common time between two records.", "5m", None
    )
    scale: float = key(
        "Factor for `count`. Fractions of jobs are carried over to the next interval.",
        0.1,
        1.0,
        gt=0,
        le=field_types.MAX_TASKS,
    )
    tasks: Taken | None = key(
        "Number of tasks of the first stage: one column, or a sum of columns divided by `per`. It is "
        "rounded up, to at least one.",
        {"columns": ["input", "shuffle"], "per": "64 MiB"},
        None,
    )
    task_s: Taken | None = key(
        "Run time in seconds of each task of the first stage, in the same forms as `tasks` (`per: "
        "1000` for milliseconds).",
        "run",
        None,
    )
    label: str = key("Name of the job in reports.", "job", "")
    tenant: str = key("Tenant of the job.", "user", "")
    job: str = key("Name of the job template, for an arrival without the key `job`.", "kind", "")


class TraceSpec(Keys):
    """A recorded trace, whose records are arrivals."""

    file: str = key(
        "Path of the trace file, relative to the scenario file. It may be compressed with gzip.",
        "last-month.csv",
        min_length=1,
    )
    format: Literal["swf", "table", "jsonl"] | None = key(
        "Standard Workload Format, text table, or JSON Lines. By default, the name of the file determines the format.",
        "swf",
        None,
    )
    columns: ColumnsSpec | None = key("Column map, which a text table requires.", {"at": "submit"}, None)
    names: list[str] = key(
        "Names of the columns of a text table without a header.", ["job", "submit", "run"], default_factory=list
    )
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = key(
        "Character between the fields of a text table. By default, the first line determines it.", ";", ""
    )
    from_s: field_types.Duration = key("Start of the used part, after the trace's first job.", "6h", 0.0, alias="from")
    until_s: field_types.Duration | None = key(
        "End of the used part, after the trace's first job.", "8h", None, alias="until"
    )
    limit: int | None = key("Maximum number of jobs.", 1000, None, ge=1)
    starts_s: field_types.Duration = key("Time in the scenario at which the trace starts.", "1h", 0.0, alias="starts")


N = TypeVar("N")


class ArrivalSpec(Keys):
    """A source of arrivals: the key `job`, and exactly one other key."""

    job: field_types.Name | None = key(
        "Name of the job template. Only an arrival whose trace names the template may omit it.", "claims", None
    )
    at: Moments | None = key(
        "Fixed times: one time or a list, each a duration or `{at: TIME, count: N}` for N jobs.",
        ["0s", "1h", {"at": "2h", "count": 50}],
        None,
    )
    poisson: PoissonSpec | None = key(
        "Arrivals that are independent of each other, at one mean rate (a Poisson process).",
        {"per_hour": 30, "until": "8h"},
        None,
    )
    on_off: OnOffSpec | None = key(
        "Bursts of arrivals with pauses. The first burst is at the start.",
        {"per_hour": 120, "on": "5m", "off": "25m", "until": "8h"},
        None,
    )
    profile: ProfileSpec | None = key(
        "A rate for each hour of the day, and a factor for each day of the week.",
        {"daily": [2] * 24, "until": "7d"},
        None,
    )
    month_end: MonthEndSpec | None = key(
        "A rate by working days, which is higher around the turn of a month.",
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
    """A pool of instances with equal workers."""

    min: int = key("Minimum number of instances.", 2, 0, ge=0, le=100_000)
    max: int = key("Maximum number of instances.", 40, ge=1, le=100_000)
    slots: int = key("Number of task slots of each instance.", 4, 1, ge=1, le=9999)
    boot: field_types.Duration = key("Time from the launch of an instance until its worker takes tasks.", "90s", 0.0)
    instance_type: str = key("EC2 instance type, which determines the price.", "m7i.large", "")
    gpus: int | None = key(
        "Number of GPUs of each instance. By default, the number of the instance type's GPUs.",
        1,
        None,
        ge=0,
        le=MAX_GPUS,
    )
    spot: Share = key("Share of the instances that are Spot Instances.", 0.5, 0.0)


class PolicySpec(Keys):
    """Scaling policy. An omitted setting has its default value in a deployment."""

    drain_target: field_types.Timeout | None = key(
        "Time in which the fleet should process the whole backlog, which determines its size.", "10m", None
    )
    cooldown_in: field_types.Duration | None = key(
        "Minimum time between two steps that shrink a pool with work.", "2m", None
    )
    idle: field_types.Duration | None = key("Time without work before a pool shrinks.", "1m", None)


class ShareEntrySpec(Keys):
    """Entry of the fair-share policy."""

    identifier: field_types.SharePrefix = key(
        "Share identifier. With an asterisk at the end, the entry applies to each share whose identifier has the "
        "prefix.",
        "team*",
    )
    weight: float = key(
        "Weight factor. A lower weight factor means a larger share.",
        0.5,
        1.0,
        ge=fair_share.MIN_WEIGHT,
        le=fair_share.MAX_WEIGHT,
    )
    max_slots: int | None = key(
        "Maximum number of slots that each share of the entry uses in each pool. By default, there is none.",
        16,
        None,
        ge=1,
        le=fair_share.MAX_SLOTS,
    )


class SharesSpec(Keys):
    """Fair-share policy of the grid, which divides the pools among the shares of the jobs. `{}` divides them evenly."""

    decay: field_types.Timeout = key(
        "Share decay: the time after which 37% of a use still counts, at most 7d.", "1h", fair_share.DEFAULT_DECAY_S
    )
    reservation: int = key(
        "Compute reservation: the percentage of each pool's maximum slots that stays free for shares without work.",
        10,
        0,
        ge=0,
        le=fair_share.MAX_RESERVATION,
    )
    shares: list[ShareEntrySpec] = key(
        "Entries. A share without an entry has the weight factor 1 and no limit.",
        [{"identifier": "research", "weight": 0.5, "max_slots": 16}],
        default_factory=list,
        max_length=fair_share.MAX_ENTRIES,
    )


class PrewarmSpec(Keys):
    """Scheduled capacity: a minimum number of instances in a pool between two times."""

    pool: field_types.Name = key("Name of the pool.", "default", "default")
    min: int = key("Minimum number of instances.", 10, ge=0, le=100_000)
    at_s: field_types.Duration = key("Start time.", "7h", alias="at")
    until_s: field_types.Duration = key("End time.", "9h", alias="until")


class FaultSpec(Keys):
    """A fault. Two lasting faults of the same kind must not overlap, because the end of the first one would also end
    the second one. Only two `pause` faults of different pools may overlap.
    """

    at_s: field_types.Duration = key("Start time.", "30m", alias="at")
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
    ] = key("Kind of the fault. " + " ".join(f"With `{name.value}`, {name.meaning}." for name in FaultName), "kill")
    for_s: field_types.Duration = key("Duration of a lasting fault.", "5m", 60.0, alias="for")
    pool: field_types.Name | None = key("Pool whose instances the fault hits. By default, all pools.", "default", None)
    share: Share | None = key(
        "Share of the instances in service that the fault hits, rounded up. By default, all.", 0.5, None
    )
    count: int | None = key("Number of instances that the fault hits, instead of `share`.", 2, None, ge=1, le=100_000)
    rate: Share | None = key(
        "Share of the requests or messages that `s3-errors`, `sqs-duplicates`, or `sqs-delays` hits. By default 0.2.",
        0.2,
        None,
    )
    notice: field_types.Duration | None = key(
        "Time from the interruption notice of a Spot Instance to its end. By default, two minutes.", "2m", None
    )
    zone: str | None = key("Letter of the zone that `zone-loss` hits. By default `a`.", "b", None)


class Bound(Of[N], Generic[N]):
    """Range of allowed values. A plain number or time as the value of a measure sets `most`."""

    least: N | None = key("Minimum.", 0, None)
    most: N | None = key("Maximum.", 0, None)


def _bound(value: Any) -> Any:
    return value if isinstance(value, dict | list) else {"most": value}


_FORMS: dict[Unit, tuple[Any, Any]] = {
    Unit.SECONDS: (field_types.Duration, "10m"),
    Unit.USD: (field_types.Cost, "12 USD"),
    Unit.NUMBER: (Amount, 0),
    Unit.SHARE: (Share, 0.2),
}


def _expected_faults(by_template: bool) -> dict[str, Any]:
    """Return a model field for the expected value of each measure."""
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
    """Expected values of measures for the jobs of one template."""


class _Expect(Keys):
    """Expected values of measures. Each measure has a maximum value, or a range `{least: MINIMUM, most: MAXIMUM}`."""


JobExpectSpec = create_model("JobExpectSpec", __base__=_JobExpect, __doc__=_JobExpect.__doc__, **_expected_faults(True))
ExpectSpec = create_model(
    "ExpectSpec",
    __base__=_Expect,
    __doc__=_Expect.__doc__,
    **_expected_faults(False),
    jobs=(
        dict[str, JobExpectSpec],  # type: ignore[valid-type]
        key(
            "Expected values of measures for the jobs of one template, by its name.",
            {"claims": {"p95_turnaround": "2h"}},
            default_factory=dict,
        ),
    ),
)


class ScenarioSpec(Keys):
    """The keys of a scenario file at the top level."""

    name: field_types.Name = key("Name, with at most 40 lower case letters, digits, `-`, and `_`.", "claims-month-end")
    about: str = key(
        "Description of the scenario and of its purpose, in one or two paragraphs.",
        "The last night of a month.",
        min_length=1,
    )
    seed: int = key("Seed of all random values.", 7, 1, ge=0)
    compress: Annotated[float, Field(ge=1, le=1_000_000)] = key(
        "Factor by which a replay divides all times, if its options contain no other factor.", 60, 1.0
    )
    zones: int = key("Number of availability zones.", 2, 1, ge=1, le=6)
    jobs: dict[field_types.Name, JobSpec] = key(
        "Job templates by name.", {"claims": {"tasks": 200, "task": "4s"}}, min_length=1
    )
    arrivals: list[ArrivalSpec] = key("Sources of arrivals.", [{"job": "claims", "at": "0s"}], min_length=1)
    pools: dict[field_types.Name, PoolSpec] = key("Pools of the fleet by name.", {"default": {"max": 10}}, min_length=1)
    policy: PolicySpec = key("Scaling policy.", {"drain_target": "10m"}, default_factory=PolicySpec)
    shares: SharesSpec | None = key(
        "Fair-share policy. By default, the grid does not have a policy and ignores shares.",
        {"shares": [{"identifier": "research", "weight": 0.5}]},
        None,
    )
    prewarm: list[PrewarmSpec] = key(
        "Scheduled capacity, which launches instances before jobs arrive.",
        [{"min": 10, "at": "7h", "until": "9h"}],
        default_factory=list,
    )
    faults: list[FaultSpec] = key(
        "Faults that are injected.", [{"at": "30m", "fault": "kill", "count": 2}], default_factory=list
    )
    expect: ExpectSpec = key(  # type: ignore[valid-type]
        "Expected values of measures, which define the verdict.",
        {"lost": 0, "p95_wait": "10m"},
        default_factory=ExpectSpec,
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
        "identifier": "x",
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
    ("jobs", "*", "share"),
    ("jobs", "*", "after"),
    ("jobs", "*", "after", "*"),
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
    ("shares", "shares", "*", "identifier"),
    ("prewarm", "*", "pool"),
    ("faults", "*", "pool"),
    ("faults", "*", "zone"),
)


def is_text(loc: Loc) -> bool:
    """Return whether a scalar at the location `loc` of a scenario file is always read as text."""
    return is_any_of(loc, _TEXT_PLACES)


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the scenario file, for editors."""
    return schema_of(ScenarioSpec, "batchlab scenario")
