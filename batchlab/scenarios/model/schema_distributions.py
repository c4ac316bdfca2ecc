"""Pydantic models of distributions and arrivals in a scenario file."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from batchlab.core import text
from batchlab.jobs import field_types
from batchlab.jobs.schema import Keys
from batchlab.scenarios.model.arrivals import WEEK_FORMS, parse_week_time_s

N = TypeVar("N")


def key(description: str, example: Any, default: Any = ..., **limits: Any) -> Any:
    """Return the model field of a key of the scenario file. A key without a default is required."""
    if "default_factory" not in limits:
        limits["default"] = default
    return Field(description=description, examples=[example], **limits)


_YEARS = range(1000, 9000)


def _number(value: Any, remedy: str = "Write for example 20.") -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise field_types.refusal(f"{text.show_value(value)} is not a number.", remedy)
    if not abs(value) <= field_types.MAX_TASKS:
        raise field_types.refusal(f"{text.show_value(value)} is too large.", remedy)
    return float(value)


def _share(value: Any) -> Any:
    percent = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", str(value))
    example = float(percent[1]) / 100 if percent else 0.5
    return _number(value, f"Write {example:g}." if percent else f"Write for example {example}.")


def _week(value: Any) -> Any:
    try:
        return parse_week_time_s(value)
    except (TypeError, ValueError) as error:
        what = f"{text.show_value(value)} is not a time of the week."
        raise field_types.refusal(what, f"Write {WEEK_FORMS}.") from error


def _date(value: Any) -> Any:
    remedy = "Write for example 2026-01-26."
    try:
        day = date.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise field_types.refusal(f"{text.show_value(value)} is not a date.", remedy) from error
    # The limit of the year keeps all computed dates valid, because a scenario may last a century, and `MonthEnd` also
    # computes days of neighboring months.
    if day.year not in _YEARS:
        raise field_types.refusal(f"{value!r} is too far away.", remedy)
    return day


def _constant_if_plain(value: Any) -> Any:
    return value if isinstance(value, dict | list) else {"constant": value}


Amount = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_share)]
Week = Annotated[float, BeforeValidator(_week), WithJsonSchema({"type": "string"})]
Day = Annotated[date, BeforeValidator(_date), WithJsonSchema({"type": "string", "format": "date"})]


class Of(Keys, Generic[N]):
    """Base class of mappings in the scenario file whose values are numbers or times."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        # A parametrized generic model does not inherit the docstring.
        cls.__doc__ = cls.__doc__ or cls.__mro__[1].__doc__

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """Return the model's name in the JSON Schema."""
        kinds = (field_types.Duration, "Times"), (field_types.Cost, "Money"), (Share, "Shares")
        return cls.__name__ + next((word for of, word in kinds if params[0] == of), "Numbers")


class Uniform(Of[N], Generic[N]):
    """Values between a minimum and a maximum."""

    least: N = key("Minimum.", 2)
    most: N = key("Maximum.", 8)


class Exponential(Of[N], Generic[N]):
    """Many small values and a few large ones."""

    mean: N = key("Mean, above 0.", 30)


class Lognormal(Of[N], Generic[N]):
    """A peak and a long right tail, which fits the run times of most tasks."""

    median: N = key("Median, above 0.", 200)
    sigma: Amount = key("Standard deviation of the logarithm of the values: 0.5 is narrow, 1.5 is wide.", 0.6)


class Pareto(Of[N], Generic[N]):
    """Most values near the minimum, and a few very large ones."""

    least: N = key("Minimum, above 0.", 10)
    alpha: Amount = key(
        "Exponent of the tail: with 3, large values are rare, with 1.1, common. Without `most`, "
        "`alpha` must be above 1.",
        1.5,
    )
    most: N | None = key("Maximum. By default, there is none.", 3600, None)


class Weibull(Of[N], Generic[N]):
    """Like the exponential distribution, but with a heavier or lighter tail."""

    scale: N = key("Scale, above 0: about two thirds of all values are below it.", 60)
    shape: Amount = key(
        "Shape: below 1, the tail is heavier than that of the exponential distribution, above 1, lighter.", 0.7
    )


class One(Of[N], Generic[N]):
    """A distribution, which is defined by exactly one of the keys in this mapping."""

    constant: N | None = key("Always this value.", 4, None)
    uniform: Uniform[N] | None = key("Values between a minimum and a maximum.", {"least": 2, "most": 8}, None)
    exponential: Exponential[N] | None = key("Many small values and a few large ones.", {"mean": 30}, None)
    lognormal: Lognormal[N] | None = key(
        "A peak and a long right tail, which fits the run times of most tasks.", {"median": 4, "sigma": 0.8}, None
    )
    pareto: Pareto[N] | None = key(
        "Most values near the minimum, and a few very large ones.", {"least": 10, "alpha": 1.5}, None
    )
    weibull: Weibull[N] | None = key(
        "Like the exponential distribution, but with a heavier or lighter tail.", {"scale": 60, "shape": 0.7}, None
    )
    empirical: list[N] | None = key(
        "Measured values, each with the same probability.", [3, 4, 4, 9], None, min_length=1
    )


class Part(One[N], Generic[N]):
    """One part of a mixture: a distribution and its weight."""

    weight: Amount = key("Weight of this part relative to the other parts, above 0.", 9)


class Draw(One[N], Generic[N]):
    """A distribution, defined by exactly one key. A plain number or time is a `constant`."""

    mixture: list[Part[N]] | None = key(
        "Weighted parts, each with a `weight` and one of the other keys, such as mostly short times "
        "and some long ones.",
        [{"weight": 9, "constant": 4}, {"weight": 1, "constant": 60}],
        None,
        min_length=1,
    )


Numbers = Annotated[Draw[Amount], BeforeValidator(_constant_if_plain, json_schema_input_type=Amount | Draw[Amount])]
Times = Annotated[
    Draw[field_types.Duration],
    BeforeValidator(_constant_if_plain, json_schema_input_type=field_types.Duration | Draw[field_types.Duration]),
]
"""Distributions of numbers and of times as values of a key."""


class TaskTimes(Draw[field_types.Duration]):
    """Run times of the tasks of a job template. With a job file, the run times are a mapping by stage."""

    by_stage: dict[str, Times] | None = Field(default=None, exclude=True)


JobTimes = Annotated[
    TaskTimes,
    BeforeValidator(
        _constant_if_plain, json_schema_input_type=field_types.Duration | Draw[field_types.Duration] | dict[str, Times]
    ),
]


class Span(Keys):
    """Start and end of the time in which a source of arrivals creates jobs."""

    from_s: field_types.Duration = key("Time from which jobs may arrive.", "30m", 0.0, alias="from")
    until_s: field_types.Duration = key("Time from which no more jobs arrive.", "8h", alias="until")


_PER_HOUR = "Mean number of jobs per hour."


class PoissonSpec(Span):
    """Arrivals that are independent of each other, at one mean rate (a Poisson process)."""

    per_hour: Amount = key(_PER_HOUR, 30)


class OnOffSpec(Span):
    """Bursts of arrivals with pauses. The first burst is at the start."""

    per_hour: Amount = key("Mean number of jobs per hour in a burst.", 120)
    on_s: field_types.Duration = key("Mean length of a burst.", "5m", alias="on")
    off_s: field_types.Duration = key("Mean length of a pause.", "25m", alias="off")
    idle_per_hour: Amount = key("Mean number of jobs per hour in a pause.", 2, 0.0)
    regular: bool = key(
        "Whether all bursts are equally long, and all pauses. By default, the lengths are random.", True, False
    )


class ProfileSpec(Span):
    """A rate for each hour of the day, and a factor for each day of the week."""

    daily: list[Amount] = key(
        "24 numbers, one for each hour from midnight: the mean number of jobs in this hour, or with "
        "`per_hour`, a weight.",
        [2] * 24,
        min_length=24,
        max_length=24,
    )
    weekly: list[Amount] = key(
        "7 factors for the rate, one for each day from Monday. By default, each is 1.",
        [1, 1, 1, 1, 1, 0.3, 0.1],
        default_factory=lambda: [1.0] * 7,
        min_length=7,
        max_length=7,
    )
    per_hour: Amount | None = key("Mean number of jobs per hour over a whole week.", 30, None)
    begins_s: Week = key(
        f"Time of the week at which the scenario starts: {WEEK_FORMS}. By default, Monday at midnight.",
        "monday 06:00",
        alias="begins",
        default_factory=lambda: 0.0,
    )


class MonthEndSpec(Span):
    """A rate by working days, which is higher around the turn of a month."""

    per_hour: Amount = key("Mean number of jobs per hour on an ordinary working day.", 2)
    begins: Day = key("Date of the scenario's first day, which starts at midnight.", "2026-01-26")
    last: list[Amount] = key(
        "Factors for the last working days of a month, from the last one backwards. By default, 6, 4, and 2.",
        [6, 4, 2],
        default_factory=lambda: [6.0, 4.0, 2.0],
    )
    first: list[Amount] = key(
        "Factors for the first working days of a month. By default, 3 for the first one.",
        [3, 1.5],
        default_factory=lambda: [3.0],
    )
    off: Amount = key("Factor for weekends and holidays.", 0.1, 0.1)
    holidays: list[Day] = key("Dates that are holidays.", ["2026-01-01"], default_factory=list)
    daily: list[Amount] = key(
        "24 weights, which distribute a day's arrivals over its hours. By default, each is 1.",
        [1] * 24,
        default_factory=lambda: [1.0] * 24,
        min_length=24,
        max_length=24,
    )


class StepAt(Keys):
    """A change of the arrival rate at a given time."""

    at_s: field_types.Duration = key("Time of the change.", "1h", alias="at")
    per_hour: Amount = key(_PER_HOUR, 120)


class StepSpec(Span):
    """A rate that changes at given times."""

    per_hour: Amount = key("Mean number of jobs per hour until the first step.", 10)
    steps: list[StepAt] = key("Changes of the rate, in order of time.", [{"at": "1h", "per_hour": 120}], min_length=1)


class RampSpec(Span):
    """A rate that changes linearly."""

    per_hour: Amount = key("Mean number of jobs per hour at the start.", 0)
    to_per_hour: Amount = key("Mean number of jobs per hour at the end.", 120)


class MomentSpec(Keys):
    """A time at which one or several jobs arrive."""

    at_s: field_types.Duration = key("Time of the arrival.", "2h", alias="at")
    count: int = key("Number of jobs that arrive at this time.", 50, 1, ge=0, le=1_000_000)


def _moment(value: Any) -> Any:
    return value if isinstance(value, dict) else {"at": value}


def _moments(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Moment = Annotated[MomentSpec, BeforeValidator(_moment, json_schema_input_type=field_types.Duration | MomentSpec)]
Moments = Annotated[
    list[Moment], BeforeValidator(_moments, json_schema_input_type=field_types.Duration | MomentSpec | list[Moment])
]
