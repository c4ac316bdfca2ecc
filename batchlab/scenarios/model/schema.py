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
    """Fan-in of the results of the previous stages.

    `gather: all` creates one task for all results. `gather: {by: NAME, groups: N}` creates one task for each of N
    groups of results.
    """

    by: str = key("Name of the field by which the results of the previous stages are grouped.", "region", min_length=1)
    groups: int = key(
        "Number of groups into which the results of the previous stages are divided.", 12, 1, ge=1, le=1_000_000
    )


class StageSpec(Keys):
    """One stage of a job template."""

    name: StageName
    task: Times = key("Run time of one task of the stage: a duration, or a distribution of durations.", "4s")
    after: After = None
    gather: Annotated[
        GroupsSpec | None, BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GroupsSpec)
    ] = key(
        "Fan-in: the stage waits for all tasks of the previous stages. `gather: all` creates one "
        "task for all results of the previous stages. `gather: {by: NAME, groups: N}` creates one "
        "task for each of the N groups of results. Without `gather`, each result of the previous "
        "stage becomes a task of this stage as soon as the result exists.",
        "all",
        None,
    )
    kind: Literal["sleep", "cpu", "memory", "io"] = key(
        "Kind of work that a simulated task does in a replay during its run time.", "cpu", "sleep"
    )
    slots: Slots = 1
    memory: Memory = None
    bundle: Bundle = None
    pool: Pool = "default"
    retry: Retry
    fails: Share = key("Share of the task attempts of the stage that end in an exception.", 0.01, 0.0)
    poison: int = key(
        "Number of tasks of each job that kill their worker in every attempt. In each job, "
        "the tasks that kill their worker are the first tasks of the stage.",
        2,
        0,
        ge=0,
        le=9999,
    )


class JobSpec(Keys):
    """A job template. Exactly one of the keys `task`, `stages`, and `file` describes the work of its jobs, except that
    `task` is also allowed with `file`.
    """

    tasks: Numbers | None = key(
        "Number of tasks in the first stage of each job: a number, or a distribution of "
        "numbers. A number drawn from the distribution is rounded to a whole number. By "
        "default, the first stage of each job has 1 task. A trace may contain the number of "
        "tasks for each job.",
        200,
        None,
    )
    task: JobTimes | None = key(
        "Run time of one task, for a job that has a single stage. In a job with a single "
        "stage, batchlab names the stage `work`. With `file`, `task` is a mapping from the "
        "name of each stage of the job file to the run time of one task of this stage. With "
        "`file`, `task` may also be one duration for the tasks of all stages.",
        "4s",
        None,
    )
    stages: list[StageSpec] | None = key(
        "Stages of the jobs, in order.", [{"name": "parse", "task": "4s"}], None, min_length=1
    )
    file: str | None = key(
        "Path of a job file, relative to the scenario file. A replay runs the work of the job "
        "file. A forecast does not run the job file, but uses the run times in `task`.",
        "../examples/claims/job.yaml",
        None,
        min_length=1,
    )
    groups: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = key(
        "Number of groups of each stage in the job file `file` that gathers results by a "
        "field. By default, each stage that gathers results by a field has 1 group.",
        {"total": 12},
        default_factory=dict,
    )
    deadline: field_types.Timeout | None = key(
        "Time from the arrival of a job to its deadline. By default, jobs do not have deadlines.", "6h", None
    )
    tenant: str = key("Name of the tenant that submits the jobs of the template.", "payer-a", "")
    priority: Priority = 0
    max_failures: int = key(
        "Number of failed tasks that the scenario allows in each job of the template. With "
        "`file`, 0 means that the limit in the job file applies.",
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
    """A number that a trace's reader computes from a record: the sum of some columns, divided by a constant."""

    columns: field_types.OneOrMany = key(
        "Names of the columns whose values are added. The sum of these values is divided by `per`.",
        "duration_ms",
        min_length=1,
    )
    per: Annotated[
        float, BeforeValidator(_per), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
    ] = key(
        "Divisor of the sum of `columns`: a number, or a size such as `64 MiB`. A size as the "
        "divisor converts a number of bytes into a number of tasks.",
        "64 MiB",
        1.0,
    )


Taken = Annotated[TakeSpec, BeforeValidator(_take, json_schema_input_type=str | list[str] | TakeSpec)]


class ColumnsSpec(Keys):
    """Column map of a trace: the columns from which the trace's reader takes each value.

    The columns of a trace are the names from a table's header, the fields of the Standard Workload Format, or the keys
    of a JSON object. A dotted name selects a key of a nested JSON object. A column map may omit the columns that the
    trace's format defines.
    """

    at: str | None = key(
        "Name of the column with the arrival time of the job, which is a number or a timestamp.", "end", None
    )
    minus: str = key(
        "Name of a column with seconds that are subtracted from the time in `at` to get the "
        "arrival time. `minus` is for a trace that records the end time and the duration of "
        "each job.",
        "duration",
        "",
    )
    unit: Annotated[str, BeforeValidator(_unit)] = key(
        "Unit of the numbers in the column `at`: `s`, `ms`, `us`, or `ns`. If the column `at` "
        "contains timestamps that are not in ISO 8601, `unit` is the strptime format of the "
        "timestamps.",
        "ms",
        "s",
    )
    count: str = key(
        "Name of the column with the number of jobs that arrive in an interval. Each record "
        "of a trace with `count` is an interval, which starts at the time `at` and lasts "
        "until the next record.",
        "value",
        "",
    )
    every: field_types.Timeout | None = key(
        "Length of the interval of a record, in a trace with `count`. By default, the length is "
        "the most common time between two records.",
        "5m",
        None,
    )
    scale: float = key(
        "Factor by which the trace's reader multiplies the number of jobs in the column `count`.",
        0.1,
        1.0,
        gt=0,
        le=field_types.MAX_TASKS,
    )
    tasks: Taken | None = key(
        "Number of tasks of a job: the name of a column, a list of columns whose values are "
        "added, or `{columns: NAMES, per: NUMBER}`. The number of tasks is rounded up.",
        {"columns": ["input", "shuffle"], "per": "64 MiB"},
        None,
    )
    task_s: Taken | None = key(
        "Run time in seconds of each task in the first stage of a job. The value of `task_s` has "
        "the same forms as the value of `tasks`.",
        "run",
        None,
    )
    label: str = key("Name of the column with the job's own name in the trace.", "job", "")
    tenant: str = key("Name of the column with the tenant of the job.", "user", "")
    job: str = key(
        "Name of the column with the name of the job template. Only an arrival without the key `job` uses this column.",
        "kind",
        "",
    )


class TraceSpec(Keys):
    """A recorded trace, whose records are arrivals of jobs."""

    file: str = key(
        "Path of the trace file, relative to the scenario file. batchlab unpacks a file that is "
        "compressed with gzip, whatever the file's name is.",
        "last-month.csv",
        min_length=1,
    )
    format: Literal["swf", "table", "jsonl"] | None = key(
        "Format of the trace file: `swf` for the Standard Workload Format, `table` for a text "
        "table with one record per line, or `jsonl` for JSON Lines. By default, batchlab derives "
        "the format from the name of the trace file.",
        "swf",
        None,
    )
    columns: ColumnsSpec | None = key(
        "Column map of the trace. A trace file with the format `table` requires a column map.", {"at": "submit"}, None
    )
    names: list[str] = key(
        "Names of the columns of a text table. Only a table whose first line does not contain the "
        "column names needs `names`.",
        ["job", "submit", "run"],
        default_factory=list,
    )
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = key(
        "Character between the fields of a text table. By default, batchlab derives the separator "
        "from the first line of the table.",
        ";",
        "",
    )
    from_s: field_types.Duration = key(
        "Start of the part of the trace that is used, as a time after the trace's first job. "
        "batchlab ignores records before the start of this part.",
        "6h",
        0.0,
        alias="from",
    )
    until_s: field_types.Duration | None = key(
        "End of the part of the trace that is used, as a time after the trace's first job. "
        "batchlab ignores records at or after the end of this part.",
        "8h",
        None,
        alias="until",
    )
    limit: int | None = key("Maximum number of jobs that arrive from the trace.", 1000, None, ge=1)
    starts_s: field_types.Duration = key(
        "Time after the start of the scenario at which the trace starts.", "1h", 0.0, alias="starts"
    )


N = TypeVar("N")


class ArrivalSpec(Keys):
    """A source of arrivals: the key `job`, and exactly one other key that defines when the jobs arrive."""

    job: field_types.Name | None = key(
        "Name of the job template of the arriving jobs. An arrival may omit `job` only if the "
        "records of its trace name the job template.",
        "claims",
        None,
    )
    at: Moments | None = key(
        "Fixed arrival times: one time or a list of times. Each time is a duration after the "
        "start of the scenario, or `{at: TIME, count: N}` for N jobs that arrive at the same "
        "time.",
        ["0s", "1h", {"at": "2h", "count": 50}],
        None,
    )
    poisson: PoissonSpec | None = key(
        "Arrivals that are independent of each other, with a constant mean rate (a Poisson process).",
        {"per_hour": 30, "until": "8h"},
        None,
    )
    on_off: OnOffSpec | None = key(
        "Bursts of arrivals with pauses between the bursts.",
        {"per_hour": 120, "on": "5m", "off": "25m", "until": "8h"},
        None,
    )
    profile: ProfileSpec | None = key(
        "Profile of arrivals, with a rate for each hour of the day and a factor for each day of the week.",
        {"daily": [2] * 24, "until": "7d"},
        None,
    )
    month_end: MonthEndSpec | None = key(
        "Calendar profile of arrivals, in which more jobs arrive at the turn of a month.",
        {"per_hour": 2, "begins": "2026-01-26", "until": "7d"},
        None,
    )
    step: StepSpec | None = key(
        "Arrivals whose rate changes at given times.",
        {"per_hour": 10, "steps": [{"at": "1h", "per_hour": 120}], "until": "2h"},
        None,
    )
    ramp: RampSpec | None = key(
        "Arrivals whose rate changes linearly.", {"per_hour": 0, "to_per_hour": 120, "until": "2h"}, None
    )
    trace: TraceSpec | None = key(
        "Recorded trace whose records are the arrivals.", {"file": "last-month.csv", "columns": {"at": "submit"}}, None
    )


SOURCES = tuple(name for name in ArrivalSpec.model_fields if name != "job")
"""Keys that name a source of arrivals."""


class PoolSpec(Keys):
    """A pool of instances with equal workers."""

    min: int = key("Minimum number of instances in the pool.", 2, 0, ge=0, le=100_000)
    max: int = key("Maximum number of instances in the pool.", 40, ge=1, le=100_000)
    slots: int = key("Number of task slots of each instance in the pool.", 4, 1, ge=1, le=9999)
    boot: field_types.Duration = key(
        "Time from the launch of an instance to the time at which its worker takes tasks.", "90s", 0.0
    )
    instance_type: str = key(
        "EC2 instance type of the pool's instances, which determines their price.", "m7i.large", ""
    )
    spot: Share = key("Share of the pool's instances that are Spot Instances.", 0.5, 0.0)


class PolicySpec(Keys):
    """Scaling policy, by which the autoscaler changes the size of the fleet."""

    drain_target: field_types.Timeout | None = key(
        "Time in which the fleet should process the whole backlog. The autoscaler computes "
        "the size of the fleet from `drain_target`.",
        "10m",
        None,
    )
    cooldown_in: field_types.Duration | None = key(
        "Minimum time between two steps in which the autoscaler shrinks a pool that has work.", "2m", None
    )
    idle: field_types.Duration | None = key(
        "Time for which a pool must be without work before the autoscaler shrinks the pool.", "1m", None
    )


class PrewarmSpec(Keys):
    """Scheduled capacity: a minimum number of instances in a pool between two times."""

    pool: field_types.Name = key("Name of the pool that has the scheduled capacity.", "default", "default")
    min: int = key("Minimum number of instances in the pool during the scheduled time.", 10, ge=0, le=100_000)
    at_s: field_types.Duration = key("Start time of the scheduled capacity.", "7h", alias="at")
    until_s: field_types.Duration = key("End time of the scheduled capacity.", "9h", alias="until")


class FaultSpec(Keys):
    """A fault that is injected into the fleet or its services.

    Two faults of the same kind that last for some time must not overlap, because the end of the first fault would also
    end the second fault. Only two `pause` faults of different pools may overlap.
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
    ] = key("Kind of the fault. " + " ".join(f"With `{name.value}`, {name.meaning}." for name in FaultName), "kill")
    for_s: field_types.Duration = key(
        "Duration of the fault, if the fault lasts for some time.", "5m", 60.0, alias="for"
    )
    pool: field_types.Name | None = key(
        "Name of the pool whose instances the fault hits. By default, the fault hits the instances of all pools.",
        "default",
        None,
    )
    share: Share | None = key(
        "Share of the instances in service that the fault hits. The resulting number of instances "
        "is rounded up. By default, the fault hits all instances in service.",
        0.5,
        None,
    )
    count: int | None = key(
        "Number of instances that the fault hits. `count` is an alternative to `share`.", 2, None, ge=1, le=100_000
    )
    rate: Share | None = key(
        "Share of the requests or messages that a fault of the kind `s3-errors`, "
        "`sqs-duplicates`, or `sqs-delays` hits. By default, such a fault hits 0.2 of the "
        "requests or messages.",
        0.2,
        None,
    )
    notice: field_types.Duration | None = key(
        "Time between the interruption notice of a Spot Instance and the end of the instance. "
        "By default, a Spot Instance receives its interruption notice two minutes before its "
        "end.",
        "2m",
        None,
    )
    zone: str | None = key(
        "Letter of the availability zone that the fault `zone-loss` hits: `a`, `b`, and so on. By "
        "default, the fault hits the zone `a`.",
        "b",
        None,
    )


class Bound(Of[N], Generic[N]):
    """Range of allowed values of a measure. A plain number or time as the value of a measure sets `most`."""

    least: N | None = key("Minimum allowed value of the measure.", 0, None)
    most: N | None = key("Maximum allowed value of the measure.", 0, None)


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
            "Expected values of measures for the jobs of one job template, as a mapping from the name of the template.",
            {"claims": {"p95_turnaround": "2h"}},
            default_factory=dict,
        ),
    ),
)


class ScenarioSpec(Keys):
    """The keys of a scenario file at the top level."""

    name: field_types.Name = key(
        "Name of the scenario, with at most 40 lower case letters, digits, `-`, and `_`.", "claims-month-end"
    )
    about: str = key(
        "Description of the scenario and of its purpose, in one or two paragraphs.",
        "The last night of a month.",
        min_length=1,
    )
    seed: int = key("Seed of all random values in the scenario.", 7, 1, ge=0)
    compress: Annotated[float, Field(ge=1, le=1_000_000)] = key(
        "Factor by which a replay divides all times of the scenario, unless the replay's options "
        "contain another factor.",
        60,
        1.0,
    )
    zones: int = key("Number of availability zones that the fleet uses.", 2, 1, ge=1, le=6)
    jobs: dict[field_types.Name, JobSpec] = key(
        "Mapping from the name of each job template to the template.",
        {"claims": {"tasks": 200, "task": "4s"}},
        min_length=1,
    )
    arrivals: list[ArrivalSpec] = key(
        "List of the sources of arrivals, each of which defines when the jobs of one template arrive.",
        [{"job": "claims", "at": "0s"}],
        min_length=1,
    )
    pools: dict[field_types.Name, PoolSpec] = key(
        "Mapping from the name of each pool of the fleet to the pool.", {"default": {"max": 10}}, min_length=1
    )
    policy: PolicySpec = key(
        "Scaling policy of the fleet. A setting that the scenario omits has its default value in a deployment.",
        {"drain_target": "10m"},
        default_factory=PolicySpec,
    )
    prewarm: list[PrewarmSpec] = key(
        "List of scheduled capacities, which launch instances before jobs arrive.",
        [{"min": 10, "at": "7h", "until": "9h"}],
        default_factory=list,
    )
    faults: list[FaultSpec] = key(
        "List of the faults that are injected, each with its start time.",
        [{"at": "30m", "fault": "kill", "count": 2}],
        default_factory=list,
    )
    expect: ExpectSpec = key(  # type: ignore[valid-type]
        "Expected values of measures, with which batchlab compares the results of a run of the scenario.",
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
    """Return whether a scalar at the location `loc` of a scenario file is always read as text."""
    return is_any_of(loc, _TEXT_PLACES)


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the scenario file, for editors."""
    return schema_of(ScenarioSpec, "batchlab scenario")
