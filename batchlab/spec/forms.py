"""The forms of single values in a job file: how each is written, checked and published.

Invariant: a form's JSON Schema accepts what its check accepts, and a refused value always comes
with the forms that are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from batchlab.costs import money
from batchlab.errors import UsageError
from batchlab.schedule import times
from batchlab.spec import units
from batchlab.task import name_problem

MIN_MEMORY_BYTES = 16 * 1024 * 1024
MOST_TASKS = 10**12
"""Of any count of tasks: more is a slip."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
PARAM_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
HANDLER_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
_SHARE_PATTERN = r"^\d+(\.\d+)?\s*%$"


def refusal(message: str, remedy: str) -> PydanticCustomError:
    """An error of one field that brings its own sentence and remedy."""
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
    raise ValueError(f"{units.shown(value)} is no size of a task")


def _allowance(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TASKS:
        return value
    if (
        isinstance(value, str)
        and re.match(_SHARE_PATTERN, value)
        and float(value.strip(" %")) <= 100
    ):
        return value
    raise ValueError(f"{units.shown(value)} is no number of tasks")


def _start(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a start time")
    units.start_s(value, 0.0)
    return value


def _cost(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{units.shown(value)} is no amount with its currency")
    try:
        money.parse(value)
    except UsageError as error:
        raise ValueError(error.message.rstrip(".")) from error
    return value


def _cron(value: object) -> str:
    return _checked(value, lambda text: times.check(text, "UTC"))


def _zone(value: object) -> str:
    return _checked(value, times.zone_of)


def _checked(value: object, check: Callable[[str], object]) -> str:
    if not isinstance(value, str):
        raise refusal(f"{units.shown(value)} is no text.", "Put it in quotes.")
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
    """A single text stands for a list of one."""
    return [value] if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=40)]
ParamName = Annotated[str, StringConstraints(pattern=PARAM_PATTERN)]
OutputName = Annotated[str, AfterValidator(_output)]
Handler = Annotated[str, StringConstraints(pattern=HANDLER_PATTERN)]
OneOrMany = Annotated[
    list[str], BeforeValidator(one_or_many, json_schema_input_type=str | list[str])
]
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
    WithJsonSchema({"type": "string", "pattern": money.PATTERN}),
]
Start = Annotated[
    str, BeforeValidator(_check(_start, units.AT_FORMS)), WithJsonSchema({"type": "string"})
]
Cron = Annotated[str, BeforeValidator(_cron), WithJsonSchema({"type": "string"})]
Zone = Annotated[str, BeforeValidator(_zone), WithJsonSchema({"type": "string"})]
BundleSize = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(_auto),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]
