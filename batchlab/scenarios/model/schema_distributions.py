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
_YEARS = range(1000, 9000)


def _number(value: Any, remedy: str = "Write for example 20.") -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise field_types.refusal(f"{text.shown(value)} is not a number.", remedy)
    if not abs(value) <= field_types.MAX_TASKS:
        raise field_types.refusal(f"{text.shown(value)} is too large.", remedy)
    return float(value)


def _share(value: Any) -> Any:
    percent = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", str(value))
    example = float(percent[1]) / 100 if percent else 0.5
    return _number(value, f"Write {example:g}." if percent else f"Write for example {example}.")


def _week(value: Any) -> Any:
    try:
        return parse_week_time_s(value)
    except (TypeError, ValueError) as error:
        what = f"{text.shown(value)} is not a time of the week."
        raise field_types.refusal(what, f"Write {WEEK_FORMS}.") from error


def _date(value: Any) -> Any:
    remedy = "Write for example 2026-01-26."
    try:
        day = date.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise field_types.refusal(f"{text.shown(value)} is not a date.", remedy) from error
    # The days of neighboring months are computed, and a scenario may last a century.
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
    """Base class of mappings of numbers or times."""

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
    """Uniform distribution between two numbers."""

    least: N = Field(description="Minimum value.", examples=[2])
    most: N = Field(description="Maximum value.", examples=[8])


class Exponential(Of[N], Generic[N]):
    """Exponential distribution: many short times, few long ones."""

    mean: N = Field(description="The mean, above 0.", examples=[30])


class Lognormal(Of[N], Generic[N]):
    """Lognormal distribution, which fits most run times: a peak with a long right tail."""

    median: N = Field(description="Median: half of all values are below it. It must be above 0.", examples=[200])
    sigma: Amount = Field(
        description="Standard deviation of the logarithm: 0.5 is a small spread, 1.5 a large one.", examples=[0.6]
    )


class Pareto(Of[N], Generic[N]):
    """Pareto distribution: most values are near the minimum, and a few are very large."""

    least: N = Field(description="Minimum value, above 0.", examples=[10])
    alpha: Amount = Field(
        description="Speed at which the tail falls: 3 gives a light tail, 1.1 a very heavy one. It "
        "must be above 1 without `most`.",
        examples=[1.5],
    )
    most: N | None = Field(
        default=None, description="Maximum value. Without it the distribution has no maximum.", examples=[3600]
    )


class Weibull(Of[N], Generic[N]):
    """Weibull distribution: like exponential, with a heavier or lighter tail."""

    scale: N = Field(
        description="Scale: about two thirds of all values are below it. It must be above 0.", examples=[60]
    )
    shape: Amount = Field(
        description="Below 1 the tail is heavier than exponential, above 1 it is lighter.", examples=[0.7]
    )


class One(Of[N], Generic[N]):
    """A distribution, given by exactly one of these keys."""

    constant: N | None = Field(default=None, description="Constant value.", examples=[4])
    uniform: Uniform[N] | None = Field(
        default=None, description="Uniform distribution between two numbers.", examples=[{"least": 2, "most": 8}]
    )
    exponential: Exponential[N] | None = Field(
        default=None, description="Exponential distribution with this mean.", examples=[{"mean": 30}]
    )
    lognormal: Lognormal[N] | None = Field(
        default=None,
        description="Lognormal distribution, which fits most run times.",
        examples=[{"median": 4, "sigma": 0.8}],
    )
    pareto: Pareto[N] | None = Field(
        default=None, description="Pareto distribution, which has a heavy tail.", examples=[{"least": 10, "alpha": 1.5}]
    )
    weibull: Weibull[N] | None = Field(
        default=None,
        description="Weibull distribution, whose tail is heavier or lighter than exponential.",
        examples=[{"scale": 60, "shape": 0.7}],
    )
    empirical: list[N] | None = Field(
        default=None,
        min_length=1,
        description="Measured values, each with the same probability.",
        examples=[[3, 4, 4, 9]],
    )


class Part(One[N], Generic[N]):
    """One of the distributions of a mixture, with its weight."""

    weight: Amount = Field(description="Weight relative to the other parts, above 0.", examples=[9])


class Draw(One[N], Generic[N]):
    """A distribution, given by exactly one of these keys. A plain number means `constant`."""

    mixture: list[Part[N]] | None = Field(
        default=None,
        min_length=1,
        description="Weighted mixture of distributions, for example mostly short times and some long ones.",
        examples=[[{"weight": 9, "constant": 4}, {"weight": 1, "constant": 60}]],
    )


Numbers = Annotated[Draw[Amount], BeforeValidator(_constant_if_plain, json_schema_input_type=Amount | Draw[Amount])]
Times = Annotated[
    Draw[field_types.Duration],
    BeforeValidator(_constant_if_plain, json_schema_input_type=field_types.Duration | Draw[field_types.Duration]),
]
"""Distributions of numbers and of times as values of a key."""


class TaskTimes(Draw[field_types.Duration]):
    """Times of tasks. With a job file, times by stage."""

    by_stage: dict[str, Times] | None = Field(default=None, exclude=True)


JobTimes = Annotated[
    TaskTimes,
    BeforeValidator(
        _constant_if_plain, json_schema_input_type=field_types.Duration | Draw[field_types.Duration] | dict[str, Times]
    ),
]


class Span(Keys):
    """Start and end of a source of arrivals."""

    from_s: field_types.Duration = Field(
        alias="from", default=0.0, description="Time from which jobs may arrive.", examples=["30m"]
    )
    until_s: field_types.Duration = Field(alias="until", description="Time from which no jobs arrive.", examples=["8h"])


_PER_HOUR = "Jobs an hour, on average."


class PoissonSpec(Span):
    """Independent arrivals at one rate."""

    per_hour: Amount = Field(description=_PER_HOUR, examples=[30])


class OnOffSpec(Span):
    """Bursts and pauses, starting with a burst."""

    per_hour: Amount = Field(description="Mean number of jobs per hour in a burst.", examples=[120])
    on_s: field_types.Duration = Field(alias="on", description="Mean length of a burst.", examples=["5m"])
    off_s: field_types.Duration = Field(alias="off", description="Mean length of a pause.", examples=["25m"])
    idle_per_hour: Amount = Field(default=0.0, description="Mean number of jobs per hour in a pause.", examples=[2])
    regular: bool = Field(
        default=False, description="Whether bursts and pauses always have their mean length.", examples=[True]
    )


class ProfileSpec(Span):
    """Profile with a rate for each hour of the day and a factor for each day of the week."""

    daily: list[Amount] = Field(
        min_length=24,
        max_length=24,
        description="24 numbers, one for each hour from midnight: jobs per hour, or weights if `per_hour` is given.",
        examples=[[2] * 24],
    )
    weekly: list[Amount] = Field(
        default_factory=lambda: [1.0] * 7,
        min_length=7,
        max_length=7,
        description="7 factors, one for each day from Monday. The default is 1 for each.",
        examples=[[1, 1, 1, 1, 1, 0.3, 0.1]],
    )
    per_hour: Amount | None = Field(
        default=None, description="Mean number of jobs per hour over a whole week.", examples=[30]
    )
    begins_s: Week = Field(
        alias="begins",
        default_factory=lambda: 0.0,
        description=f"Time of the week at the scenario's start: {WEEK_FORMS}. The default is Monday at midnight.",
        examples=["monday 06:00"],
    )


class MonthEndSpec(Span):
    """Calendar profile with an ordinary rate and higher rates around the turn of a month."""

    per_hour: Amount = Field(description="Mean number of jobs per hour on an ordinary working day.", examples=[2])
    begins: Day = Field(description="Date on which the scenario starts at midnight.", examples=["2026-01-26"])
    last: list[Amount] = Field(
        default_factory=lambda: [6.0, 4.0, 2.0],
        description="Factors for the month's last working day, the one before it, and so on. The "
        "default is 6, 4, and 2.",
        examples=[[6, 4, 2]],
    )
    first: list[Amount] = Field(
        default_factory=lambda: [3.0],
        description="Factors for the month's first working day and those after it. The default is 3.",
        examples=[[3, 1.5]],
    )
    off: Amount = Field(default=0.1, description="Factor for weekends and holidays.", examples=[0.1])
    holidays: list[Day] = Field(default_factory=list, description="Days without work.", examples=[["2026-01-01"]])
    daily: list[Amount] = Field(
        default_factory=lambda: [1.0] * 24,
        min_length=24,
        max_length=24,
        description="24 weights, one for each hour from midnight. The default is 1 for each.",
        examples=[[1] * 24],
    )


class StepAt(Keys):
    """A change of the rate."""

    at_s: field_types.Duration = Field(alias="at", description="Start time.", examples=["1h"])
    per_hour: Amount = Field(description=_PER_HOUR, examples=[120])


class StepSpec(Span):
    """A rate that changes at given times."""

    per_hour: Amount = Field(description="Mean number of jobs per hour at the start.", examples=[10])
    steps: list[StepAt] = Field(
        min_length=1, description="The changes, in order of time.", examples=[[{"at": "1h", "per_hour": 120}]]
    )


class RampSpec(Span):
    """A rate that changes linearly from start to end."""

    per_hour: Amount = Field(description="Jobs per hour at the start.", examples=[0])
    to_per_hour: Amount = Field(description="Jobs per hour at the end.", examples=[120])


class MomentSpec(Keys):
    """A time at which several jobs arrive."""

    at_s: field_types.Duration = Field(alias="at", description="Time of the arrivals.", examples=["2h"])
    count: int = Field(
        default=1, ge=0, le=1_000_000, description="Number of jobs that arrive at this time.", examples=[50]
    )


def _moment(value: Any) -> Any:
    return value if isinstance(value, dict) else {"at": value}


def _moments(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Moment = Annotated[MomentSpec, BeforeValidator(_moment, json_schema_input_type=field_types.Duration | MomentSpec)]
Moments = Annotated[
    list[Moment], BeforeValidator(_moments, json_schema_input_type=field_types.Duration | MomentSpec | list[Moment])
]
