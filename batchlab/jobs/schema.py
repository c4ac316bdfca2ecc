"""Pydantic models of the job file with the meaning, unit, and default of each key, and JSON Schemas for editors.

Invariant: the published JSON Schema, the reference page of the job file, and the checks of a job file are derived from
the models of this module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema

from batchlab.core.job_definition import MAX_GPUS, SPLITS, SplitBy
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
    """The job's input: the files that become the tasks of the first stage, and the way they are split into tasks."""

    files: field_types.OneOrMany = Field(
        min_length=1,
        description="Path or pattern of the input files, or a list of them: all local, or all in the bucket. A local "
        "pattern is relative to the job file. `**` matches any number of folders. Hidden files match only a pattern "
        "that contains the dot of their names. `s3://BUCKET/raw/prefix/` selects all objects below a prefix in the "
        "grid's own bucket, and `s3://BUCKET/raw/key` selects one object (`batchlab grid env` prints the name of the "
        "bucket). The files of one pattern are sorted by path. A file that matches several patterns is used once.",
        examples=["data/*.csv"],
    )
    split: Annotated[
        SplitBy, Field(strict=False), WithJsonSchema({"type": "string", "enum": [str(way) for way in SplitBy]})
    ] = Field(
        default=SplitBy.FILE,
        description="Input of each task: "
        + "; ".join(f"`{way}`: {split.meaning}" for way, split in SPLITS.items())
        + ". A task never receives parts of several files, and batchlab never splits a line.",
        examples=["lines"],
    )
    size: field_types.TaskSize | None = Field(
        default=None,
        description="Amount of input for one task. "
        + " ".join(f"With `split: {way}`: {split.size}." for way, split in SPLITS.items() if split.size),
        examples=["8 MiB"],
    )
    header: bool = Field(
        default=False,
        description="Whether the first line of each input file is a header, with which every part of the file begins. "
        f"Only with {' or '.join(f'`split: {way}`' for way in SPLITS if SPLITS[way].has_header)}.",
        examples=[True],
    )


class RetrySpec(Keys):
    """Retry rule of a stage: when and how often a failed task is retried. A plain number as the value of `retry` sets
    `attempts`.

    The loss of a worker (a crash of the machine, a Spot interruption, scale-in) does not count as an attempt.
    """

    attempts: int = Field(
        default=_RULE.attempts,
        ge=1,
        le=9999,
        description="Maximum number of attempts of a task, including the first attempt.",
        examples=[3],
    )
    backoff: field_types.Duration = Field(
        default=_RULE.backoff_s, description="Wait between a task's first and second attempt.", examples=["2s"]
    )
    factor: float = Field(
        default=_RULE.factor,
        ge=1,
        le=1000,
        description="Factor by which the wait grows after each attempt.",
        examples=[2.0],
    )
    max_backoff: field_types.Duration = Field(
        default=_RULE.max_backoff_s, description="Longest wait between two attempts.", examples=["15m"]
    )
    jitter: float = Field(
        default=_RULE.jitter,
        ge=0,
        le=1,
        description="Share by which the wait is changed at random: with 0.25, by up to 25% in either direction.",
        examples=[0.25],
    )
    on: Annotated[
        list[RetryKind], BeforeValidator(field_types.one_or_many, json_schema_input_type=RetryKind | list[RetryKind])
    ] = Field(
        default_factory=list,
        description="Kinds of failure after which a task is retried, by default all: `exception` (the handler raised "
        "an exception), `exit` (the command ended with an error status), `timeout` (the task ran longer than its "
        "`timeout`), `memory` (the task exceeded its memory limit), `crash` (the task's process died), and `input` "
        "(the task's input could not be read).",
        examples=[["timeout", "exit"]],
    )
    exit_codes: list[int] = Field(
        default_factory=list,
        description="Exit statuses of a command after which a task is retried, by default all errors. A negative "
        "number is the number of the signal that ended the command.",
        examples=[[75]],
    )
    exceptions: list[str] = Field(
        default_factory=list,
        description="Class names of the exceptions after which a task is retried, by default all.",
        examples=[["ConnectionError"]],
    )

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Yield the key, the message, and the remedy for each contradiction between keys of a retry rule."""
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
        description="Name of the stage. The name must be unique in the job. The name has at most 40 lower case "
        "letters, digits, `-`, and `_`.",
        examples=["total"],
    ),
]
After = Annotated[
    field_types.OneOrMany | None,
    Field(
        description="Name of the stage that this stage follows, or a list of names. `after` may name only "
        "stages that are listed before this stage. By default, a stage follows the previous "
        "stage in the list, and the first stage reads the job's input. With `after: []`, the "
        "stage reads the job's input. If a stage without `gather` follows several stages, "
        "these stages must have the same number of tasks. Each task of a stage that follows "
        "several stages receives a mapping from the name of each previous stage to its "
        "result.",
        examples=["total"],
    ),
]
Retry = Annotated[
    RetrySpec,
    BeforeValidator(rule_of, json_schema_input_type=int | RetrySpec),
    Field(
        default_factory=RetrySpec,
        description="Rule that defines when a failed task is retried. By default, a task has 3 attempts in total.",
        examples=[3],
    ),
]
Slots = Annotated[
    int,
    Field(
        ge=1,
        le=9999,
        description="Number of task slots that one task uses. A worker has one task slot per CPU, or the "
        "number of slots that its pool defines.",
        examples=[2],
    ),
]
Gpus = Annotated[
    int,
    Field(
        ge=0,
        le=MAX_GPUS,
        description="Number of GPUs that one task uses alone. The task's variable `CUDA_VISIBLE_DEVICES` names the "
        "GPUs. The instances of the stage's pool must have at least as many GPUs.",
        examples=[1],
    ),
]
Memory = Annotated[
    field_types.Memory | None,
    Field(
        description="Memory limit of one task, in bytes or as text with a unit. The memory limit must be "
        "at least 16 MiB. A task that exceeds its memory limit fails with the kind `memory`. "
        "By default, the memory of a task is not limited.",
        examples=["512 MiB"],
    ),
]
Bundle = Annotated[
    field_types.BundleSize,
    Field(
        description="Number of tasks of the stage that are sent to a worker in one message. With `auto` (the "
        "default), batchlab computes the number from the measured run time of tasks, so that "
        "several short tasks share one message.",
        examples=[100],
    ),
]
Pool = Annotated[
    field_types.Name,
    Field(description="Name of the pool whose workers run the tasks of the stage.", examples=["big-memory"]),
]
Priority = Annotated[
    int,
    Field(
        ge=-1000,
        le=1000,
        description="Priority of the job. Jobs with a higher priority start before jobs with a lower priority.",
        examples=[10],
    ),
]


JobShare = Annotated[
    field_types.ShareIdentifier | None,
    Field(
        description="Share identifier of the job in the grid's fair-share policy, such as the name of a team. By "
        "default, the job belongs to the share `default`.",
        examples=["research"],
    ),
]


class ResourcesSpec(Keys):
    """Resources of the worker that one task of the stage needs."""

    slots: Slots = 1
    gpus: Gpus = 0
    memory: Memory = None


class GatherSpec(Keys):
    """Fan-in of the upstream results.

    `gather: all` creates one task for all upstream results. `gather` with a mapping creates one task for each group of
    upstream results.
    """

    by: Annotated[str, BeforeValidator(_group)] = Field(
        min_length=1,
        description="Name of the field by which upstream results are grouped. Results with the same value of "
        "the field are in one group, and the value is the name of the group. If a result is a "
        "list, each element of the list is grouped by the field.",
        examples=["region"],
    )


class StageSpec(Keys):
    """One stage of the job. Exactly one of `python` and `command` defines the program that runs for each task."""

    name: StageName
    python: field_types.Handler | None = Field(
        default=None,
        description="Python function that runs for each task, in the form `module:function`. The module "
        "must be in the code folder, or installed on the workers.",
        examples=["handlers:total"],
    )
    command: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Program that runs for each task, and its arguments, as a list that may contain "
        "placeholders. batchlab runs the program without a shell.",
        examples=[["wc", "-l", "{input}"]],
    )
    stdout: field_types.OutputName | None = Field(
        default=None,
        description="Name of the result file for the standard output of the command. By default, the standard output "
        "is written to the task's log.",
        examples=["count.txt"],
    )
    after: After = None
    gather: Annotated[
        GatherSpec | None, BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GatherSpec)
    ] = Field(
        default=None,
        description="Fan-in: the stage waits for all tasks of the previous stages. `all` creates one task for all "
        "results, and `{by: FIELD}` one task for each value of the field FIELD in the results. Without `gather`, "
        "each result of the previous stage becomes a task of this stage as soon as the result exists.",
        examples=["all"],
    )
    timeout: field_types.Timeout | None = Field(
        default=None,
        description="Longest run time of one task of the stage. By default, the run time is not limited.",
        examples=["5m"],
    )
    retry: Retry
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec,
        description="Resources that one task of the stage needs.",
        examples=[{"memory": "512 MiB"}],
    )
    bundle: Bundle = None
    pool: Pool = "default"
    side_effects: bool = Field(
        default=False,
        description="Whether a task changes something outside of its results, such as a row in a database, so that it "
        "must not run in two places at once. Tasks with side effects never get speculative copies.",
        examples=[True],
    )
    speculative_copies: bool = Field(
        default=True,
        description="Whether a task that runs far longer than the stage's other tasks may get a second, speculative "
        "copy on another worker near the end of the stage. The first result counts, and the other run is stopped.",
        examples=[False],
    )


class FailureSpec(Keys):
    """Number of failed tasks that the job allows, and the effect of more failed tasks on the job."""

    max_failures: field_types.Allowance = Field(
        default=0,
        description="Number of failed tasks, or percentage of the tasks of a stage. A job with more failed tasks "
        "ends in the state FAILED.",
        examples=["5%"],
    )
    then: Literal["carry_on", "stop"] = Field(
        default="carry_on",
        description="Effect of more failed tasks: with `carry_on`, the job runs all tasks that can still run; with "
        "`stop`, the job immediately cancels its remaining tasks.",
        examples=["stop"],
    )


class JobSpec(Keys):
    """The keys of a job file at the top level."""

    name: field_types.Name = Field(
        description="Name of the job, which is also a part of the job's id. The name has at most 40 lower "
        "case letters, digits, `-`, and `_`.",
        examples=["month-end-claims"],
    )
    code: str = Field(
        default=".",
        description="Folder of the job's code, relative to the job file. Each worker receives a copy of the folder "
        "without the job's input, caches, virtual environments, and `.git`.",
        examples=["src"],
    )
    input: InputSpec = Field(
        description="Files that the job reads, and the way they are split into tasks.",
        examples=[{"files": "data/*.csv"}],
    )
    stages: list[StageSpec] = Field(
        min_length=1,
        description="Stages of the job, in order.",
        examples=[[{"name": "total", "python": "handlers:total"}]],
    )
    failure: FailureSpec = Field(
        default_factory=FailureSpec,
        description="Number of failed tasks that the job allows, and the effect of more failed tasks.",
        examples=[{"max_failures": "5%"}],
    )
    priority: Priority = 0
    share: JobShare = None
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of the job, as a mapping of text to text. batchlab does not interpret them.",
        examples=[{"cost-centre": "4711"}],
    )
    params: dict[field_types.ParamName, JsonValue] = Field(
        default_factory=dict,
        description="Parameters of the job with their default values. A handler reads a parameter from "
        "`ctx.params`, and a command contains it as `{params.KEY}`.",
        examples=[{"currency": "USD"}],
    )
    notify: Notify = Field(default_factory=list)
    max_cost: field_types.Cost | None = Field(
        default=None,
        description="Cap on the cost of the job on AWS, in USD at list prices. At the cap, batchlab does not launch "
        "more instances for the job and finishes its running tasks. The job then waits until its cap is raised.",
        examples=["5USD"],
    )
    at: field_types.Start | None = Field(
        default=None,
        description="Start time of the job: a wait such as `+10m`, or an ISO 8601 time with its time zone. By "
        "default, the job starts immediately.",
        examples=["2026-01-31T06:00:00Z"],
    )
    cron: field_types.Cron | None = Field(
        default=None,
        description="Cron expression for repeated runs of the job: minute, hour, day of month, month, and "
        "weekday. Only `batchlab schedule add` accepts a job file with `cron`.",
        examples=["0 2 * * 1-5"],
    )
    timezone: field_types.Zone = Field(
        default="UTC",
        description="IANA name of the time zone in which the `cron` expression is evaluated.",
        examples=["Europe/Berlin"],
    )

    def upstream(self, stage: int) -> tuple[str, ...]:
        """Return the names of the upstream stages of the stage with the index `stage`. Without `after`, a stage follows
        the previous stage.
        """
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
"""Map of locations in a job file to the models of the mappings at the locations. "*" in a location matches any index.
"""

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
    """Return whether a scalar at the location `loc` is always text. For example, 2024 as a name is text."""
    return is_any_of(loc, _TEXT_PLACES)


def json_schema() -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of the job file, for editors."""
    return schema_of(JobSpec, "batchlab job file")


def schema_of(model: type[BaseModel], title: str) -> dict[str, Json]:
    """Return the JSON Schema (draft 2020-12) of a `model`.

    The names of the definitions in the JSON Schema are the titles of the models.
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

    The default null of a key is removed because a job file cannot contain null.
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
