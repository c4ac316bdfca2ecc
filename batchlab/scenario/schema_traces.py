"""A trace as a scenario file names it: which file, how it is read, what is taken of it.

Invariant: as in schema.py; traces/ says what the values mean.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from batchlab.scenario.traces import check_unit
from batchlab.spec import forms, units
from batchlab.spec.schema import Keys

_UNIT = "Write s, ms, us, ns, or for example '%d/%b/%Y:%H:%M:%S %z'."


def _per(value: Any) -> Any:
    try:
        number = float(units.size_bytes(value) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError) as error:
        what = f"{units.shown(value)} is neither a number nor a size."
        raise forms.refusal(what, "Write for example 1000 or 64 MiB.") from error
    if not 0 < number < float("inf"):
        raise forms.refusal("It must be above 0.", "Write for example 1000 or 64 MiB.")
    return number


def _unit(value: Any) -> Any:
    if isinstance(value, str):
        try:
            check_unit(value)
        except ValueError as error:
            what = str(error)
            raise forms.refusal(f"{what[0].upper()}{what[1:]}.", _UNIT) from error
    return value


def _delimiter(value: Any) -> Any:
    if value == r"\t":
        return "\t"
    if isinstance(value, str) and (len(value) != 1 or value in '"\r\n'):
        what = f"{units.shown(value)} cannot be between fields."
        raise forms.refusal(what, r"Write one character, such as ';' or '\t'.")
    return value


def _take(value: Any) -> Any:
    return value if isinstance(value, dict) else {"columns": value}


class TakeSpec(Keys):
    """A number of a record: the sum of some columns, divided."""

    columns: forms.OneOrMany = Field(
        min_length=1, description="The columns, which are added up.", examples=["duration_ms"]
    )
    per: Annotated[
        float,
        BeforeValidator(_per),
        WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]}),
    ] = Field(
        default=1.0,
        description="What that is divided by: a number, or a size where bytes become tasks.",
        examples=["64 MiB"],
    )


Taken = Annotated[
    TakeSpec, BeforeValidator(_take, json_schema_input_type=str | list[str] | TakeSpec)
]


class ColumnsSpec(Keys):
    """Which column says what: a name of a table's header, a field of the Standard Workload Format,
    or a key of a JSON object, dotted where nested. What a format has a column of its own for need
    not be said."""

    at: str | None = Field(
        default=None, description="When a job arrives: a number or a timestamp.", examples=["end"]
    )
    minus: str = Field(
        default="",
        description="Seconds before `at` that it arrived, in traces that note ends.",
        examples=["duration"],
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
    every: forms.Timeout | None = Field(
        default=None,
        description="With `count`: how long an interval is; what is most common unless said.",
        examples=["5m"],
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        le=forms.MOST_TASKS,
        description="With `count`: what it is multiplied by.",
        examples=[0.1],
    )
    tasks: Taken | None = Field(
        default=None,
        description="How many tasks a job has: a column, several that are added, or `{columns: , "
        "per: }`. It is rounded up.",
        examples=[{"columns": ["input", "shuffle"], "per": "64 MiB"}],
    )
    task_s: Taken | None = Field(
        default=None,
        description="How many seconds each of its first tasks takes, said likewise.",
        examples=["run"],
    )
    label: str = Field(default="", description="Its name.", examples=["job"])
    tenant: str = Field(default="", description="Whose it is.", examples=["user"])
    job: str = Field(
        default="",
        description="Which of the scenario's `jobs` it is, where the arrival does not say so.",
        examples=["kind"],
    )


class TraceSpec(Keys):
    """Arrivals that were recorded."""

    file: str = Field(
        min_length=1,
        description="The trace, relative to the scenario; gzip is unpacked, whatever its name is.",
        examples=["last-month.csv"],
    )
    format: Literal["swf", "table", "jsonl"] | None = Field(
        default=None,
        description="The Standard Workload Format, a table of text, or JSON Lines such as a "
        "record; by the file's name unless said.",
        examples=["swf"],
    )
    columns: ColumnsSpec | None = Field(
        default=None,
        description="Which column says what; a table needs it.",
        examples=[{"at": "submit"}],
    )
    names: list[str] = Field(
        default_factory=list,
        description="Names of a table's columns, where its first line has none.",
        examples=[["job", "submit", "run"]],
    )
    delimiter: Annotated[str, BeforeValidator(_delimiter)] = Field(
        default="",
        description="What is between a table's fields; by its first line unless said.",
        examples=[";"],
    )
    from_s: forms.Duration = Field(
        alias="from",
        default=0.0,
        description="What came earlier after the trace's first job is left out.",
        examples=["6h"],
    )
    until_s: forms.Duration | None = Field(
        alias="until", default=None, description="What came later is left out.", examples=["8h"]
    )
    limit: int | None = Field(
        default=None, ge=1, description="No more jobs than this.", examples=[1000]
    )
    starts_s: forms.Duration = Field(
        alias="starts",
        default=0.0,
        description="When in the scenario the trace begins.",
        examples=["1h"],
    )
