"""Pydantic models of job templates and traces in a scenario file.

Job templates are like those of a job file, with times instead of code. traces/ defines the meaning
of a trace's values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from batchlab.core import text
from batchlab.jobs import field_types
from batchlab.jobs.schema import After, Bundle, Keys, Memory, Pool, Priority, Retry, Slots, StageName
from batchlab.scenarios.model.schema_distributions import JobTimes, Numbers, Share, Times
from batchlab.scenarios.traces.rows import check_unit


def _gather(value: Any) -> Any:
    if isinstance(value, str) and value != "all":
        remedy = "Write 'all', or {by: key, groups: 12}."
        raise field_types.refusal(f"gather cannot be '{value}'.", remedy)
    return {"by": "*"} if value == "all" else value


class GroupsSpec(Keys):
    """Fan-in: `gather: all` makes one task of all results; this makes one for each group."""

    by: str = Field(min_length=1, description="Name of the field by which results are grouped.", examples=["region"])
    groups: int = Field(default=1, ge=1, le=1_000_000, description="Number of groups.", examples=[12])


class StageSpec(Keys):
    """A step of a job."""

    name: StageName
    task: Times = Field(description="Time of a task: a duration, or a distribution of durations.", examples=["4s"])
    after: After = None
    gather: Annotated[
        GroupsSpec | None, BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GroupsSpec)
    ] = Field(
        default=None,
        description="Wait for every task before: `all` makes one task of all their results, "
        "`{by: NAME, groups: N}` one for each group. Without it each result becomes a task of "
        "this stage as soon as it is there.",
        examples=["all"],
    )
    kind: Literal["sleep", "cpu", "memory", "io"] = Field(
        default="sleep", description="Work of a stand-in in a replay while its time passes.", examples=["cpu"]
    )
    slots: Slots = 1
    memory: Memory = None
    bundle: Bundle = None
    pool: Pool = "default"
    retry: Retry
    fails: Share = Field(default=0.0, description="Share of all attempts that end in an exception.", examples=[0.01])
    poison: int = Field(
        default=0,
        ge=0,
        le=9999,
        description="The first tasks of each job, in this number, kill their worker whenever they run.",
        examples=[2],
    )


class JobSpec(Keys):
    """A job template. `task`, `stages`, or `file` describes its work."""

    tasks: Numbers | None = Field(
        default=None,
        description="Number of root tasks: a number, or a distribution of numbers, which are "
        "rounded. The default is 1. A trace may have a number for each job.",
        examples=[200],
    )
    task: JobTimes | None = Field(
        default=None,
        description="How long a task takes, where the job is a single stage (which is then named "
        "`work`). With `file`, a mapping of the job file's stages to how long their tasks take, or "
        "one duration for all of them.",
        examples=["4s"],
    )
    stages: list[StageSpec] | None = Field(
        default=None, min_length=1, description="The steps, in order.", examples=[[{"name": "parse", "task": "4s"}]]
    )
    file: str | None = Field(
        default=None,
        min_length=1,
        description="A job file, relative to the scenario, whose real work a replay does. A "
        "forecast takes the times in `task`.",
        examples=["../examples/claims/job.yaml"],
    )
    groups: dict[str, Annotated[int, Field(ge=1, le=1_000_000)]] = Field(
        default_factory=dict,
        description="With `file`: number of groups of each stage that gathers by a field. The default is 1.",
        examples=[{"total": 12}],
    )
    deadline: field_types.Timeout | None = Field(
        default=None,
        description="Time from a job's arrival to its deadline. Jobs have none by default.",
        examples=["6h"],
    )
    tenant: str = Field(default="", description="Tenant of the job.", examples=["payer-a"])
    priority: Priority = 0
    max_failures: int = Field(
        default=0,
        ge=0,
        le=10**12,
        description="Number of failed tasks that a job may have. With `file`, 0 means its limit.",
        examples=[5],
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

    columns: field_types.OneOrMany = Field(
        min_length=1, description="Columns whose values are added.", examples=["duration_ms"]
    )
    per: Annotated[
        float, BeforeValidator(_per), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
    ] = Field(
        default=1.0,
        description="What that is divided by: a number, or a size where bytes become tasks.",
        examples=["64 MiB"],
    )


Taken = Annotated[TakeSpec, BeforeValidator(_take, json_schema_input_type=str | list[str] | TakeSpec)]


class ColumnsSpec(Keys):
    """Column map: names from a table's header, fields of the Standard Workload Format, or keys of a
    JSON object, with dots for nested objects. Columns that a format defines may be omitted.
    """

    at: str | None = Field(default=None, description="Arrival time: a number or a timestamp.", examples=["end"])
    minus: str = Field(
        default="", description="Seconds before `at` that it arrived, in traces that note ends.", examples=["duration"]
    )
    unit: Annotated[str, BeforeValidator(_unit)] = Field(
        default="s",
        description="What `at` counts in, `s`, `ms`, `us` or `ns`; or the strptime format of its "
        "timestamps, where they are not ISO 8601.",
        examples=["ms"],
    )
    count: str = Field(
        default="",
        description="How many jobs arrive from `at` on until the next record, where a record is an "
        "interval and no job.",
        examples=["value"],
    )
    every: field_types.Timeout | None = Field(
        default=None,
        description="With `count`: length of an interval. The default is the most common one.",
        examples=["5m"],
    )
    scale: float = Field(
        default=1.0, gt=0, le=field_types.MAX_TASKS, description="With `count`: factor of the counts.", examples=[0.1]
    )
    tasks: Taken | None = Field(
        default=None,
        description="How many tasks a job has: a column, several that are added, or `{columns: , "
        "per: }`. It is rounded up.",
        examples=[{"columns": ["input", "shuffle"], "per": "64 MiB"}],
    )
    task_s: Taken | None = Field(
        default=None, description="Seconds of each root task, in the same forms as `tasks`.", examples=["run"]
    )
    label: str = Field(default="", description="Name of the job.", examples=["job"])
    tenant: str = Field(default="", description="Tenant of the job.", examples=["user"])
    job: str = Field(
        default="", description="Name of the scenario's job, if the arrival does not name it.", examples=["kind"]
    )


class TraceSpec(Keys):
    """A recorded trace of arrivals."""

    file: str = Field(
        min_length=1,
        description="The trace, relative to the scenario; gzip is unpacked, whatever its name is.",
        examples=["last-month.csv"],
    )
    format: Literal["swf", "table", "jsonl"] | None = Field(
        default=None,
        description="The Standard Workload Format, a table of text, or JSON Lines such as a "
        "record. The default is derived from the file's name.",
        examples=["swf"],
    )
    columns: ColumnsSpec | None = Field(
        default=None, description="Column map. A table needs it.", examples=[{"at": "submit"}]
    )
    names: list[str] = Field(
        default_factory=list,
        description="Names of a table's columns, if its first line has none.",
        examples=[["job", "submit", "run"]],
    )
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = Field(
        default="",
        description="Separator of a table's fields. The default is derived from the first line.",
        examples=[";"],
    )
    from_s: field_types.Duration = Field(
        alias="from",
        default=0.0,
        description="Time after the trace's first job before which records are left out.",
        examples=["6h"],
    )
    until_s: field_types.Duration | None = Field(
        alias="until",
        default=None,
        description="Time after the trace's first job from which records are left out.",
        examples=["8h"],
    )
    limit: int | None = Field(default=None, ge=1, description="Maximum number of jobs.", examples=[1000])
    starts_s: field_types.Duration = Field(
        alias="starts", default=0.0, description="Time in the scenario at which the trace starts.", examples=["1h"]
    )
