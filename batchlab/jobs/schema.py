"""The job file as pydantic models: what each key means, its unit, its default.

Invariant: the published JSON Schema, the reference page and the checks all come from these
models, so that they cannot disagree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from batchlab.core.job_definition import RetryRule
from batchlab.jobs import field_types
from batchlab.jobs.field_types import Notify, NotifySpec
from batchlab.jobs.validation import Shape
from batchlab.jobs.yaml_source import Loc, lies

RetryKind = Literal["exception", "exit", "timeout", "memory", "crash", "input"]
"""Kinds of failure that another try can mend."""

_RULE = RetryRule()


def rule_of(value: Any) -> Any:
    """A number alone is the number of tries."""
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
        raise field_types.refusal(
            "'*' is no name of a field.", "Write gather: all for one task of all."
        )
    return value


class Keys(BaseModel):
    """A mapping of the file: no other keys, and no value taken for another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputSpec(Keys):
    """Where the tasks of the first stage come from, and how raw data is cut into them."""

    files: field_types.OneOrMany = Field(
        min_length=1,
        description="Raw data: local patterns relative to the job file (`**` crosses folders, "
        "each of them once, however many links lead there; hidden files need a pattern that names "
        "the dot), or what lies below `raw/` in the grid's own bucket: `s3://BUCKET/raw/prefix/` "
        "for all below a prefix, `s3://BUCKET/raw/key` for one object; BUCKET is the one that "
        "`batchlab grid env` prints, and `local` on `local`. One or a list, of one kind. Matches "
        "of one pattern are sorted by path; a file that several patterns match is taken once.",
        examples=["data/*.csv"],
    )
    split: Literal["file", "lines", "bytes", "items"] = Field(
        default="file",
        description="What one task gets: a whole `file`; some `lines` of a file; a part of about "
        "`size` `bytes` that begins and ends between lines; or `items`, the JSON values of a "
        "JSON Lines file. A task never mixes files, and no line is ever cut.",
        examples=["lines"],
    )
    size: field_types.TaskSize | None = Field(
        default=None,
        description="How much one task gets. With `lines`: lines, 1000 unless said. With `bytes`: "
        "bytes or a size such as `8 MiB`, which is also the value unless said; a longer line is "
        "a part of its own. With `items`: items; 1 (unless said) gives a task the item itself, "
        "more give it a list.",
        examples=["8 MiB"],
    )
    header: bool = Field(
        default=False,
        description="Whether the first line of each file is a header, which every part of the "
        "file gets again. Only with `lines` and `bytes`.",
        examples=[True],
    )


class RetrySpec(Keys):
    """When and how often a failed task is tried again. A number alone means `attempts`.

    The loss of a worker (crash of the machine, Spot interruption, scale-in) never counts.
    """

    attempts: int = Field(
        default=_RULE.attempts,
        ge=1,
        le=9999,
        description="Number of tries in all; 1 means no retry.",
        examples=[3],
    )
    backoff: field_types.Duration = Field(
        default=_RULE.backoff_s,
        description="Wait before the second try, seconds or text with a unit.",
        examples=["2s"],
    )
    factor: float = Field(
        default=_RULE.factor,
        ge=1,
        le=1000,
        description="What each further wait is multiplied by.",
        examples=[2.0],
    )
    max_backoff: field_types.Duration = Field(
        default=_RULE.max_backoff_s,
        description="The longest wait, seconds or text with a unit.",
        examples=["15m"],
    )
    jitter: float = Field(
        default=_RULE.jitter,
        ge=0,
        le=1,
        description="Share of itself by which each wait is changed at random: 0.25 is ±25 %.",
        examples=[0.25],
    )
    on: Annotated[
        list[RetryKind],
        BeforeValidator(
            field_types.one_or_many, json_schema_input_type=RetryKind | list[RetryKind]
        ),
    ] = Field(
        default_factory=list,
        description="Kinds of failure that are tried again: `exception` (the handler raised), "
        "`exit` (the command's exit status), `timeout`, `memory` (over its limit), `crash` (the "
        "process died), `input` (the input could not be read). None named: all of them.",
        examples=[["timeout", "exit"]],
    )
    exit_codes: list[int] = Field(
        default_factory=list,
        description="Only these exit statuses of a command are tried again; negative is a signal.",
        examples=[[75]],
    )
    exceptions: list[str] = Field(
        default_factory=list,
        description="Only exceptions of these class names are tried again.",
        examples=[["ConnectionError"]],
    )


# What the stages and jobs of a scenario have in common with these.
StageName = Annotated[
    field_types.Name,
    Field(
        description="Name of the stage, unique in the job: lower case letters, digits, `-` and "
        "`_`, at most 40 characters.",
        examples=["total"],
    ),
]
After = Annotated[
    field_types.OneOrMany | None,
    Field(
        description="The stage or stages it follows, which are listed before it. Unless said: the "
        "previous one in the list, and the job's input for the first. `[]`: the job's input. "
        "After several without `gather`, which must have equally many tasks, a task gets its "
        "result of each, by the stage's name.",
        examples=["total"],
    ),
]
Retry = Annotated[
    RetrySpec,
    BeforeValidator(rule_of, json_schema_input_type=int | RetrySpec),
    Field(
        default_factory=RetrySpec,
        description="When a failed task is tried again. Unless said: 3 tries in all.",
        examples=[3],
    ),
]
Slots = Annotated[
    int,
    Field(
        ge=1,
        le=9999,
        description="Task slots that a task takes; a worker has one per CPU or what its pool says.",
        examples=[2],
    ),
]
Memory = Annotated[
    field_types.Memory | None,
    Field(
        description="Most memory the task may use, bytes or text with a unit, at least 16 MiB; a "
        "task that needs more fails with `memory`. No limit unless said.",
        examples=["512 MiB"],
    ),
]
Bundle = Annotated[
    field_types.BundleSize,
    Field(
        description="Tasks that travel as one message. `auto`, which is also the value unless "
        "said, follows the measured run time, so that tiny tasks do not pay for a message each.",
        examples=[100],
    ),
]
Pool = Annotated[
    field_types.Name, Field(description="Pool of workers that runs it.", examples=["big-memory"])
]
Priority = Annotated[
    int,
    Field(ge=-1000, le=1000, description="Jobs with a higher number start first.", examples=[10]),
]


class ResourcesSpec(Keys):
    """What one task needs of its worker."""

    slots: Slots = 1
    memory: Memory = None


class GatherSpec(Keys):
    """Fan-in: `gather: all` makes one task of all results; this makes one for each group."""

    by: Annotated[str, BeforeValidator(_group)] = Field(
        min_length=1,
        description="Field of the upstream results (or of their elements, where a result is a "
        "list) whose value names the group.",
        examples=["region"],
    )


class StageSpec(Keys):
    """One step: exactly one of `python` and `command` says what runs for each task."""

    name: StageName
    python: field_types.Handler | None = Field(
        default=None,
        description="Python function to call, `module:function`. The module lies in the code "
        "folder or is installed with the workers; the function is looked for, without running "
        "any code, before the job is accepted.",
        examples=["handlers:total"],
    )
    command: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Program and arguments to run, with placeholders. No shell is involved. A "
        "number is passed as it is written.",
        examples=[["wc", "-l", "{input}"]],
    )
    stdout: field_types.OutputName | None = Field(
        default=None,
        description="Name of the output file that takes the command's standard output; without "
        "it, standard output goes to the log.",
        examples=["count.txt"],
    )
    after: After = None
    gather: Annotated[
        GatherSpec | None,
        BeforeValidator(_gather, json_schema_input_type=Literal["all"] | GatherSpec),
    ] = Field(
        default=None,
        description="Wait for every task before: `all` makes one task of all their results, "
        "`{by: FIELD}` one for each value of a field. Without it each result becomes a task of "
        "this stage as soon as it is there.",
        examples=["all"],
    )
    timeout: field_types.Timeout | None = Field(
        default=None,
        description="Longest run time of one task, seconds or text with a unit. No limit unless "
        "said.",
        examples=["5m"],
    )
    retry: Retry
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec,
        description="What one task needs.",
        examples=[{"memory": "512 MiB"}],
    )
    bundle: Bundle = None
    pool: Pool = "default"


class FailureSpec(Keys):
    """What failed tasks mean for the job."""

    max_failures: field_types.Allowance = Field(
        default=0,
        description="Failed tasks that the job survives: a number, or a percentage of the tasks "
        "of a stage. With more, the job ends FAILED.",
        examples=["5%"],
    )
    then: Literal["carry_on", "stop"] = Field(
        default="carry_on",
        description="With too many failures, `carry_on` runs what can still run, `stop` cancels "
        "the rest at once.",
        examples=["stop"],
    )


class JobSpec(Keys):
    """The job as a whole."""

    name: field_types.Name = Field(
        description="Name of the job, part of its id: lower case letters, digits, `-` and `_`, at "
        "most 40 characters.",
        examples=["month-end-claims"],
    )
    code: str = Field(
        default=".",
        description="Folder of your code, relative to the job file; unless said, the job file's "
        "own. Workers get a copy, without the input, caches, virtual environments and `.git`.",
        examples=["src"],
    )
    input: InputSpec = Field(description="The job's input.", examples=[{"files": "data/*.csv"}])
    stages: list[StageSpec] = Field(
        min_length=1,
        description="The steps, in order.",
        examples=[[{"name": "total", "python": "handlers:total"}]],
    )
    failure: FailureSpec = Field(
        default_factory=FailureSpec,
        description="How many failed tasks the job survives, and what follows from more.",
        examples=[{"max_failures": "5%"}],
    )
    priority: Priority = 0
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Labels for your own accounting, text to text.",
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
        description="Cap on what the job costs on AWS, in USD at list prices: beyond it nothing "
        "more is launched for it, what runs is finished, and the job waits until the cap is "
        "raised. Unless said there is none.",
        examples=["5USD"],
    )
    at: field_types.Start | None = Field(
        default=None,
        description="When to start: a wait such as `+10m`, or an ISO 8601 time with its zone. At "
        "once unless said.",
        examples=["2026-01-31T06:00:00Z"],
    )
    cron: field_types.Cron | None = Field(
        default=None,
        description="When to run again and again: minute, hour, day of month, month and "
        "weekday, as cron has them. For `batchlab schedule add`, whose options take its place; "
        "what runs a job once (`run`, `job submit`, the web page) refuses it.",
        examples=["0 2 * * 1-5"],
    )
    timezone: field_types.Zone = Field(
        default="UTC",
        description="IANA name of the time zone that `cron` is meant in.",
        examples=["Europe/Berlin"],
    )

    def upstream(self, stage: int) -> tuple[str, ...]:
        """Names of the stages that the `stage`-th follows, the default filled in."""
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
"""Every model by the place of its mapping in the file; "*" is any index."""

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
    """Whether a scalar at `loc` is text however it is written: 2024 is a good name."""
    return lies(loc, _TEXT_PLACES)
