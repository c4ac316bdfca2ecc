"""Job file as pydantic models: the meaning, unit, and default of each key, and JSON Schemas for editors.

Invariant: the published JSON Schema, the reference page, and the checks are all derived from the models of this module,
so they cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from batchlab.core.job_definition import SPLITS, SplitBy
from batchlab.core.model import FailureKind, Json
from batchlab.core.retry_rule import RetryRule
from batchlab.jobs import field_types
from batchlab.jobs.field_types import Notify, NotifySpec
from batchlab.jobs.validation import Shape
from batchlab.jobs.yaml_source import Loc, is_any_of

RetryKind = Literal["exception", "exit", "timeout", "memory", "crash", "input"]
"""Kinds of failure for which a retry can help."""

_RULE = RetryRule()


def rule_of(value: Any) -> Any:
    """Return a plain number as a mapping with the number as `attempts`, and a mapping unchanged."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"attempts": value}
    if isinstance(value, dict | RetrySpec):
        return value
    raise field_types.refusal(
        "'retry' must be a number of tries or a mapping of keys.",
        "Write for example `retry: 3`, or `retry: {attempts: 3, backoff: 2s}`.",
    )


def _gather(value: Any) -> Any:
    if value == "all":
        return GatherSpec.model_construct(by="*")
    if isinstance(value, str):
        raise field_types.refusal(f"gather cannot be '{value}'.", "Write 'all' or {by: FIELD}.")
    return value


def _group(value: Any) -> Any:
    if value == "*":
        raise field_types.refusal("'*' is not the name of a field.", "Write gather: all for one task of all.")
    return value


class Keys(BaseModel):
    """Base model of a mapping in the file, which refuses unknown keys and does not convert values."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputSpec(Keys):
    """Source of the tasks of the first stage, and how raw data is split into tasks."""

    files: field_types.OneOrMany = Field(
        min_length=1,
        description="Raw data, one pattern or a list of one kind. A local pattern is relative to "
        "the job file. `**` matches folders, each of them once, even if several links lead to it. "
        "Hidden files need a pattern that contains the dot. `s3://BUCKET/raw/prefix/` means all "
        "objects below a prefix in the grid's own bucket, and `s3://BUCKET/raw/key` one object. "
        "`batchlab grid env` prints the name of BUCKET; on `local` it is `local`. Matches of one "
        "pattern are sorted by path. A file that several patterns match is used once.",
        examples=["data/*.csv"],
    )
    split: Annotated[
        SplitBy, Field(strict=False), WithJsonSchema({"type": "string", "enum": [str(way) for way in SplitBy]})
    ] = Field(
        default=SplitBy.FILE,
        description=f"Input of one task: {'; '.join(split.meaning for split in SPLITS.values())}. "
        "A task never has parts of several files, and a line is never split.",
        examples=["lines"],
    )
    size: field_types.TaskSize | None = Field(
        default=None,
        description="Amount of input for one task. "
        + " ".join(f"With `{way}`: {split.size}." for way, split in SPLITS.items() if split.size),
        examples=["8 MiB"],
    )
    header: bool = Field(
        default=False,
        description="Whether the first line of each file is a header. Every part of the file then "
        f"begins with the header. Only with {' and '.join(f'`{way}`' for way in SPLITS if SPLITS[way].has_header)}.",
        examples=[True],
    )


class RetrySpec(Keys):
    """When and how often a failed task is retried. A plain number sets `attempts`.

    The loss of a worker (a crash of the machine, a Spot interruption, scale-in) does not count as an attempt.
    """

    attempts: int = Field(
        default=_RULE.attempts, ge=1, le=9999, description="Total number of attempts; 1 means no retry.", examples=[3]
    )
    backoff: field_types.Duration = Field(
        default=_RULE.backoff_s,
        description="Wait before the second attempt, in seconds or as text with a unit.",
        examples=["2s"],
    )
    factor: float = Field(
        default=_RULE.factor, ge=1, le=1000, description="Factor by which each further wait grows.", examples=[2.0]
    )
    max_backoff: field_types.Duration = Field(
        default=_RULE.max_backoff_s, description="Longest wait, in seconds or as text with a unit.", examples=["15m"]
    )
    jitter: float = Field(
        default=_RULE.jitter,
        ge=0,
        le=1,
        description="Share by which each wait is changed at random: 0.25 means ±25%.",
        examples=[0.25],
    )
    on: Annotated[
        list[RetryKind], BeforeValidator(field_types.one_or_many, json_schema_input_type=RetryKind | list[RetryKind])
    ] = Field(
        default_factory=list,
        description="Kinds of failure that are tried again: `exception` (the handler raised one), "
        "`exit` (the command's exit status), `timeout`, `memory` (the limit was exceeded), "
        "`crash` (the process died), `input` (the input could not be read). Default: all of them.",
        examples=[["timeout", "exit"]],
    )
    exit_codes: list[int] = Field(
        default_factory=list,
        description="Only these exit statuses of a command are tried again; a negative number means a signal.",
        examples=[[75]],
    )
    exceptions: list[str] = Field(
        default_factory=list,
        description="Only exceptions of these class names are tried again.",
        examples=[["ConnectionError"]],
    )

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield the key, the message, and the remedy of each contradiction between keys."""
        for key, kind in (("exit_codes", "exit"), ("exceptions", "exception")):
            if getattr(self, key) and self.on and kind not in self.on:
                yield key, f"'{key}' has no effect, because 'on' does not contain '{kind}'.", f"Add {kind} to on."

    def rule(self) -> RetryRule:
        """Return the retry rule in the form that the grid uses."""
        return RetryRule(
            attempts=self.attempts,
            backoff_s=self.backoff,
            factor=self.factor,
            max_backoff_s=self.max_backoff,
            jitter=self.jitter,
            kinds=tuple(FailureKind(kind) for kind in self.on),
            exit_codes=tuple(self.exit_codes),
            exceptions=tuple(self.exceptions),
        )


# The stages and jobs of a scenario also use the types below.
StageName = Annotated[
    field_types.Name,
    Field(
        description="Name of the stage, unique in the job: lower case letters, digits, `-`, and "
        "`_`, at most 40 characters.",
        examples=["total"],
    ),
]
After = Annotated[
    field_types.OneOrMany | None,
    Field(
        description="The stage or stages that this stage follows. They must be listed before it. "
        "Default: the previous stage in the list; for the first stage, the job's input. `[]` "
        "means the job's input. Without `gather`, several stages must have the same number of "
        "tasks, and a task receives the result of each, by the stage's name.",
        examples=["total"],
    ),
]
Retry = Annotated[
    RetrySpec,
    BeforeValidator(rule_of, json_schema_input_type=int | RetrySpec),
    Field(
        default_factory=RetrySpec,
        description="When a failed task is tried again. Default: 3 attempts in total.",
        examples=[3],
    ),
]
Slots = Annotated[
    int,
    Field(
        ge=1,
        le=9999,
        description="Task slots that a task uses. A worker has one slot per CPU, or the number that its pool defines.",
        examples=[2],
    ),
]
Memory = Annotated[
    field_types.Memory | None,
    Field(
        description="Memory limit of the task, in bytes or as text with a unit, at least 16 MiB. "
        "A task that needs more fails with `memory`. Default: no limit.",
        examples=["512 MiB"],
    ),
]
Bundle = Annotated[
    field_types.BundleSize,
    Field(
        description="Number of tasks in one message. `auto` (default) depends on the measured run "
        "time, so that small tasks do not need a message each.",
        examples=[100],
    ),
]
Pool = Annotated[field_types.Name, Field(description="Pool of workers that runs the stage.", examples=["big-memory"])]
Priority = Annotated[int, Field(ge=-1000, le=1000, description="Jobs with a higher number start first.", examples=[10])]


class ResourcesSpec(Keys):
    """Resources of the worker that one task needs."""

    slots: Slots = 1
    memory: Memory = None


class GatherSpec(Keys):
    """Fan-in of the upstream results.

    `gather: all` creates one task for all upstream results. `gather` with a mapping creates one task for each group of
    upstream results.
    """

    by: Annotated[str, BeforeValidator(_group)] = Field(
        min_length=1,
        description="Field of the upstream results, or of the elements of results that are lists. "
        "Its value is the name of the group.",
        examples=["region"],
    )


class StageSpec(Keys):
    """One stage of the job. Exactly one of `python` and `command` defines the program that runs for each task."""

    name: StageName
    python: field_types.Handler | None = Field(
        default=None,
        description="Python function to call, `module:function`. The module is in the code "
        "folder, or installed on the workers. batchlab checks that the function exists before it "
        "accepts the job, without running any code.",
        examples=["handlers:total"],
    )
    command: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Program and arguments to run, with placeholders, without a shell. A number "
        "is passed as it is written.",
        examples=[["wc", "-l", "{input}"]],
    )
    stdout: field_types.OutputName | None = Field(
        default=None,
        description="Name of the output file for the command's standard output. Default: standard "
        "output goes to the log.",
        examples=["count.txt"],
    )
    after: After = None
    gather: Annotated[
        GatherSpec | None, BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GatherSpec)
    ] = Field(
        default=None,
        description="Wait for all tasks of the previous stages. `all` creates one task for all "
        "their results, `{by: FIELD}` one task for each value of a field. Without `gather`, each "
        "result becomes a task of this stage as soon as it exists.",
        examples=["all"],
    )
    timeout: field_types.Timeout | None = Field(
        default=None,
        description="Longest run time of one task, in seconds or as text with a unit. Default: no limit.",
        examples=["5m"],
    )
    retry: Retry
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec, description="Resources that one task needs.", examples=[{"memory": "512 MiB"}]
    )
    bundle: Bundle = None
    pool: Pool = "default"


class FailureSpec(Keys):
    """Effect of failed tasks on the job."""

    max_failures: field_types.Allowance = Field(
        default=0,
        description="Number of failed tasks that the job allows, or a percentage of the tasks of "
        "a stage. With more failures, the job ends FAILED.",
        examples=["5%"],
    )
    then: Literal["carry_on", "stop"] = Field(
        default="carry_on",
        description="With too many failures, `carry_on` runs all tasks that can still run, and "
        "`stop` cancels the rest immediately.",
        examples=["stop"],
    )


class JobSpec(Keys):
    """The job as a whole."""

    name: field_types.Name = Field(
        description="Name of the job, and part of its id: lower case letters, digits, `-`, and "
        "`_`, at most 40 characters.",
        examples=["month-end-claims"],
    )
    code: str = Field(
        default=".",
        description="Folder of your code, relative to the job file. Default: the job file's own "
        "folder. Workers receive a copy, without the input, caches, virtual environments, and "
        "`.git`.",
        examples=["src"],
    )
    input: InputSpec = Field(description="The job's input.", examples=[{"files": "data/*.csv"}])
    stages: list[StageSpec] = Field(
        min_length=1, description="The steps, in order.", examples=[[{"name": "total", "python": "handlers:total"}]]
    )
    failure: FailureSpec = Field(
        default_factory=FailureSpec,
        description="How many failed tasks the job allows, and what happens with more.",
        examples=[{"max_failures": "5%"}],
    )
    priority: Priority = 0
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Labels for your own accounting; keys and values are text.",
        examples=[{"cost-centre": "4711"}],
    )
    params: dict[field_types.ParamName, JsonValue] = Field(
        default_factory=dict,
        description="Parameters with their defaults, for handlers and as `{params.KEY}` for "
        "commands. `--set KEY=VALUE` replaces one.",
        examples=[{"currency": "USD"}],
    )
    notify: Notify = Field(default_factory=list)
    max_cost: field_types.Cost | None = Field(
        default=None,
        description="Cap on the cost of the job on AWS, in USD at list prices. At the cap, no "
        "more instances are launched for the job, running tasks are finished, and the job waits "
        "until the cap is raised. Default: no cap.",
        examples=["5USD"],
    )
    at: field_types.Start | None = Field(
        default=None,
        description="Start time: a wait such as `+10m`, or an ISO 8601 time with its time zone. Default: immediately.",
        examples=["2026-01-31T06:00:00Z"],
    )
    cron: field_types.Cron | None = Field(
        default=None,
        description="Cron expression for repeated runs: minute, hour, day of month, month, and "
        "weekday. Only for `batchlab schedule add`, whose options override it. `run`, `job "
        "submit`, and the web page run a job once, so they refuse it.",
        examples=["0 2 * * 1-5"],
    )
    timezone: field_types.Zone = Field(
        default="UTC", description="IANA name of the time zone of `cron`.", examples=["Europe/Berlin"]
    )

    def upstream(self, stage: int) -> tuple[str, ...]:
        """Return the names of the stages that a stage follows. Without `after`, a stage follows the previous stage."""
        return field_types.upstream(self.stages, stage)


SECTIONS: dict[Loc, type[BaseModel]] = {
    (): JobSpec,
    ("input",): InputSpec,
    ("stages", "*"): StageSpec,
    ("stages", "*", "gather"): GatherSpec,
    ("stages", "*", "retry"): RetrySpec,
    ("stages", "*", "resources"): ResourcesSpec,
    ("failure",): FailureSpec,
    ("notify", "*"): NotifySpec,
}
"""All models by the location of their mapping in the file. "*" in a location matches any index."""

SHAPE = Shape(
    JobSpec,
    "job file",
    "Write name:, input: and stages:.",
    {"name": "unnamed", "input": {"files": "-"}, "files": "-", "by": "-"},
    free=frozenset({("params",)}),
)

_TEXT_PLACES: tuple[Loc, ...] = (
    ("name",),
    ("code",),
    ("at",),
    ("cron",),
    ("timezone",),
    ("max_cost",),
    ("tags", "*"),
    ("stages", "*", "name"),
    ("stages", "*", "pool"),
    ("stages", "*", "stdout"),
    ("stages", "*", "after"),
    ("stages", "*", "after", "*"),
    ("stages", "*", "command", "*"),
    ("stages", "*", "retry", "exceptions", "*"),
)


def is_text(loc: Loc) -> bool:
    """Return whether a scalar at `loc` is always text, such as 2024 as a name."""
    return is_any_of(loc, _TEXT_PLACES)


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the job file, for editors."""
    return schema_of(JobSpec, "batchlab job file")


def schema_of(model: type[BaseModel], title: str) -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of a `model`.

    The definitions in the schema have the titles of the models as names.
    """
    schema: dict[str, Json] = _plain(model.model_json_schema())
    text = json.dumps(schema)
    for name, part in schema["$defs"].items():
        title_of = part.get("title", name)
        if name != title_of:
            text = text.replace(json.dumps(name), json.dumps(title_of))
            text = text.replace(f"#/$defs/{name}", f"#/$defs/{title_of}")
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **json.loads(text), "title": title}


def _plain(schema: Json) -> Json:
    """Return `schema` without two additions of pydantic: titles that repeat the key, and null as the default of an
    optional key.

    The default null is removed because a job file cannot contain null.
    """
    if isinstance(schema, list):
        return [_plain(part) for part in schema if part != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _plain(value) for key, value in schema.items()}
    for key, field in plain.get("properties", {}).items():
        if field.get("title") == key.replace("_", " ").title():
            del field["title"]
        if "default" in field and field["default"] is None:
            del field["default"]
        if len(field.get("anyOf", ())) == 1:
            field.update(field.pop("anyOf")[0])
    return plain
