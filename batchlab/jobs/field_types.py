"""Types of single values in a job file, the model of the key `notify`, and the checks of the order of stages.

Invariants: the JSON Schema of a type accepts the same values as the type's check. The error for an invalid value lists
the accepted forms. A notification target of a job cannot be a command, because a user who submits jobs must not run
commands on the manager's machine. Stages that pass the checks form a graph without a cycle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from batchlab.core import due_times
from batchlab.core import text as units
from batchlab.core.errors import UsageError
from batchlab.core.notifications import MAX_TARGETS
from batchlab.core.pricing import price_book
from batchlab.core.task_context import name_problem
from batchlab.jobs.yaml_source import Loc, Problem, suggest

MIN_MEMORY_BYTES = 16 * 1024 * 1024
MAX_TASKS = 10**12
"""Maximum value of a number of tasks in a job file. A larger number is probably a typing error."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
PARAM_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
SHARE_PATTERN = r"^[A-Za-z0-9]{1,255}$"
SHARE_PREFIX_PATTERN = r"^([A-Za-z0-9]{1,255}\*?|\*)$"
HANDLER_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
_SHARE_PATTERN = r"^\d+(\.\d+)?\s*%$"


def refusal(message: str, remedy: str) -> PydanticCustomError:
    """Return a pydantic error for a field, with the given message and remedy."""
    return PydanticCustomError("refused", "{message}", {"message": message, "remedy": remedy})


def _check(parse: Callable[[object], Any], forms: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise refusal(f"{error}.", f"Write {forms}.") from error

    return check


def _either(title: str, kind: str, minimum: int, pattern: str) -> WithJsonSchema:
    number = {"type": kind, "minimum": minimum}
    text = {"type": "string", "pattern": pattern}
    return WithJsonSchema({"title": title, "anyOf": [number, text]})


def _timeout(value: object) -> float:
    if (limit := units.seconds(value)) < 0.001:
        raise ValueError(f"{value!r} leaves no time to run")
    return limit


def _memory(value: object) -> int:
    if (limit := units.size_bytes(value)) < MIN_MEMORY_BYTES:
        raise ValueError(f"{value!r} is less than the 16 MiB that any program needs")
    return limit


def _task_size(value: object) -> int | str:
    if isinstance(value, str):
        units.size_bytes(value)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= units.LARGEST_BYTES:
        return value
    raise ValueError(f"{units.show_value(value)} is not the size of a task")


def _allowance(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TASKS:
        return value
    if isinstance(value, str) and re.match(_SHARE_PATTERN, value) and float(value.strip(" %")) <= 100:
        return value
    raise ValueError(f"{units.show_value(value)} is not a number of tasks")


def _start(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a start time")
    units.start_s(value, 0.0)
    return value


def _cost(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{units.show_value(value)} is not an amount with its currency")
    try:
        price_book.parse(value)
    except UsageError as error:
        raise ValueError(error.message.rstrip(".")) from error
    return value


def _cron(value: object) -> str:
    return _check_text(value, lambda text: due_times.check(text, "UTC"))


def _zone(value: object) -> str:
    return _check_text(value, due_times.zone_of)


def _check_text(value: object, check: Callable[[str], object]) -> str:
    if not isinstance(value, str):
        raise refusal(f"{units.show_value(value)} is not text.", "Put it in quotes.")
    try:
        check(value)
    except UsageError as error:
        raise refusal(error.message, error.remedy) from error
    return value


def _output(value: str) -> str:
    if problem := name_problem(value):
        raise refusal(f"The output name '{value}' {problem}.", "Write for example count.txt.")
    return value


def _auto(value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise refusal(f"bundle cannot be '{value}'.", "Write auto, or a number of tasks.")
    return None if value == "auto" else value


def one_or_many(value: Any) -> Any:
    """Return a single text as a list with one element, and any other value unchanged."""
    return [value] if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=40)]
ShareIdentifier = Annotated[str, StringConstraints(pattern=SHARE_PATTERN)]
SharePrefix = Annotated[str, StringConstraints(pattern=SHARE_PREFIX_PATTERN)]
"""Share identifier, or a prefix and an asterisk, of an entry of a fair-share policy."""
ParamName = Annotated[str, StringConstraints(pattern=PARAM_PATTERN)]
OutputName = Annotated[str, AfterValidator(_output)]
Handler = Annotated[str, StringConstraints(pattern=HANDLER_PATTERN)]
OneOrMany = Annotated[list[str], BeforeValidator(one_or_many, json_schema_input_type=str | list[str])]
Duration = Annotated[
    float,
    BeforeValidator(_check(units.seconds, units.DURATION_FORMS)),
    _either("duration", "number", 0, units.DURATION_PATTERN),
]
Timeout = Annotated[
    float,
    BeforeValidator(_check(_timeout, units.DURATION_FORMS)),
    _either("duration", "number", 0, units.DURATION_PATTERN),
]
Memory = Annotated[
    int,
    BeforeValidator(_check(_memory, units.SIZE_FORMS)),
    _either("size", "integer", MIN_MEMORY_BYTES, units.SIZE_PATTERN),
]
TaskSize = Annotated[
    int | str,
    PlainValidator(_check(_task_size, "a number from 1, or with split: bytes a size: 8 MiB")),
    _either("number or size", "integer", 1, units.SIZE_PATTERN),
]
Allowance = Annotated[
    int | str,
    PlainValidator(_check(_allowance, "0, a number of tasks, or a share such as 5%")),
    _either("number or percentage", "integer", 0, _SHARE_PATTERN),
]
Cost = Annotated[
    str,
    BeforeValidator(_check(_cost, "an amount with its currency such as 5USD")),
    WithJsonSchema({"type": "string", "pattern": price_book.PATTERN}),
]
Start = Annotated[str, BeforeValidator(_check(_start, units.AT_FORMS)), WithJsonSchema({"type": "string"})]
Cron = Annotated[str, BeforeValidator(_cron), WithJsonSchema({"type": "string"})]
Zone = Annotated[str, BeforeValidator(_zone), WithJsonSchema({"type": "string"})]
BundleSize = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(_auto),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]


Moment = Literal["ended", "succeeded", "failed", "cancelled", "failures", "stuck", "capped"]


def _ended() -> list[Moment]:
    return ["ended"]


class NotifySpec(BaseModel):
    """Receiver of notifications about the job. Exactly one of `webhook`, `sns`, and `target` is set."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    webhook: str | None = Field(
        default=None,
        description=(
            "URL that receives each notification as a POST request, with https. A URL on the manager's own machine may "
            "use http, and needs the permission of the grid's operator."
        ),
        examples=["https://hooks.example.org/batch"],
    )
    sns: str | None = Field(
        default=None,
        description="ARN of the SNS topic that receives the notifications.",
        examples=["arn:aws:sns:eu-central-1:123456789012:batch"],
    )
    target: str | None = Field(
        default=None, description="Name of a notification target of the grid that jobs may use.", examples=["chat"]
    )
    on: Annotated[list[Moment], BeforeValidator(one_or_many, json_schema_input_type=Moment | list[Moment])] = Field(
        default_factory=_ended,
        description=(
            "Moments at which a notification is sent: `ended` (the job has ended, default), `succeeded`, `failed`, "
            "or `cancelled` (the job has ended in this state), `failures` (a number of tasks has failed), `stuck` "
            "(the job has not progressed for a time), and `capped` (a cap on the cost stops the job)."
        ),
        examples=[["failed", "stuck"]],
    )
    secret: str | None = Field(
        default=None,
        description=(
            "Key that signs notifications to the webhook: `env:BATCHLAB_NOTIFY_…` names a variable in the manager's "
            "environment, which the operator of the grid must allow for the webhook."
        ),
        examples=["env:BATCHLAB_NOTIFY_SECRET"],
    )
    failures: int = Field(
        default=1,
        ge=1,
        le=MAX_TASKS,
        description="Number of failed tasks after which the notification `failures` is sent, once.",
        examples=[10],
    )
    stuck_after: Timeout = Field(
        default=600.0,
        description="Time without progress of the job after which the notification `stuck` is sent.",
        examples=["10m"],
    )


Notify = Annotated[
    list[NotifySpec],
    Field(
        max_length=MAX_TARGETS,
        description="Receivers of notifications about the job, in addition to the grid's notification targets.",
        examples=[[{"webhook": "https://hooks.example.org/batch", "on": "failed"}]],
    ),
]


class Staged(Protocol):
    """Attributes of a stage in a job file or in a scenario that the checks use."""

    @property
    def name(self) -> str: ...

    @property
    def after(self) -> Sequence[str] | None: ...

    @property
    def gather(self) -> object | None: ...


def upstream(stages: Sequence[Staged], stage: int) -> tuple[str, ...]:
    """Return the names of the upstream stages of the stage with the index `stage`. Without `after`, a stage follows the
    previous stage.
    """
    names = stages[stage].after
    if names is not None:
        return tuple(names)
    return (stages[stage - 1].name,) if stage else ()


def unique_names(stages: Sequence[Staged], at: Loc) -> Iterator[Problem]:
    """Yield a problem for each repeated name of a stage. `at` is the location of the list of stages in the file."""
    first: dict[str, int] = {}
    for i, stage in enumerate(stages):
        if stage.name in first:
            number = first[stage.name] + 1
            message = f"Stage {number} is named '{stage.name}' already."
            yield Problem((*at, i, "name"), message, "Give this stage another name.")
        first.setdefault(stage.name, i)


def order(stages: Sequence[Staged], at: Loc) -> Iterator[Problem]:
    """Yield a problem for each unknown, repeated, or later stage in a key `after`, and for a cycle of stages."""
    names = [stage.name for stage in stages]
    for i, stage in enumerate(stages):
        for j, before in enumerate(stage.after or ()):
            if before not in names:
                message = f"The stage '{before}' in 'after' does not exist."
                yield Problem((*at, i, "after", j), message, suggest(before, names, "stages"))
            elif before in (stage.after or ())[:j]:
                message = f"'{before}' is named twice."
                yield Problem((*at, i, "after", j), message, "Delete one of the two.")
    upstream_of = {name: upstream(stages, i) for i, name in enumerate(names)}
    cycle = _cycle(upstream_of) if len(upstream_of) == len(names) else []
    if cycle:
        loc = (*at, names.index(cycle[-1]), "after")
        message = f"The stages form a cycle: {' → '.join(cycle)}."
        yield Problem(loc, message, "Change 'after' so that one of them comes first.")
        return
    for i, stage in enumerate(stages):
        for j, before in enumerate(stage.after or ()):
            if before in names[i + 1 :]:
                message = f"The stage '{before}' is listed after this one, which follows it."
                remedy = "List the stages in an order in which they can run."
                yield Problem((*at, i, "after", j), message, remedy)


def _cycle(before: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the stages of a cycle in the direction of the data. The first stage is repeated at the end."""
    open_stages = dict(before)
    while ready := [name for name, names in open_stages.items() if not any(b in open_stages for b in names)]:
        for name in ready:
            del open_stages[name]
    if not open_stages:
        return []
    path = [next(iter(open_stages))]
    while path[-1] not in path[:-1]:
        path.append(next(b for b in open_stages[path[-1]] if b in open_stages))
    return path[path.index(path[-1]) :][::-1]


def gathers(stages: Sequence[Staged], at: Loc) -> Iterator[Problem]:
    """Yield a problem for each gather stage without an upstream stage."""
    for i, stage in enumerate(stages):
        if stage.gather is not None and not upstream(stages, i):
            message = f"Stage '{stage.name}' follows no stage, so it has nothing to gather."
            remedy = "Delete gather, or name the stages before in 'after'."
            yield Problem((*at, i, "gather"), message, remedy, at_key=True)
