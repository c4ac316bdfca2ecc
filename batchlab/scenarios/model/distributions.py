"""Distributions of task times and job sizes, by their quantile functions.

Invariant: every number is ≥ 0, and depends on nothing but the unit handed in. Parameters are
seconds where the draw is a time; ValueError where they make no distribution.

How many tasks the stages of a job have, by how many it begins with.

Invariant: of jobs whose tasks all succeed, with groups as the template says.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import exp, gamma, isfinite, log, log1p
from statistics import NormalDist, fmean

from batchlab.scenarios.model.values import Distribution, JobTemplate, StageTemplate

_normal = NormalDist().inv_cdf


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isfinite(number) and number > 0):
            raise ValueError(f"{name} must be a number above 0, not {number}")


def _not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a number of at least 0, not {number}")


@dataclass(frozen=True, slots=True)
class Constant:
    """Always `value`."""

    value: float

    def __post_init__(self) -> None:
        _not_negative(value=self.value)

    @property
    def mean(self) -> float:
        return self.value

    def at(self, unit: float) -> float:  # noqa: ARG002 - a draw without chance
        return self.value

    def scaled(self, factor: float) -> Constant:
        return Constant(self.value * factor)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any number from `least` to `most`, each as likely."""

    least: float
    most: float

    def __post_init__(self) -> None:
        _not_negative(least=self.least, most=self.most)
        if self.most < self.least:
            raise ValueError(f"most ({self.most}) must not be below least ({self.least})")

    @property
    def mean(self) -> float:
        return (self.least + self.most) / 2

    def at(self, unit: float) -> float:
        return self.least + (self.most - self.least) * unit

    def scaled(self, factor: float) -> Uniform:
        return Uniform(self.least * factor, self.most * factor)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Without memory, of this mean."""

    mean: float

    def __post_init__(self) -> None:
        _positive(mean=self.mean)

    def at(self, unit: float) -> float:
        return -self.mean * log1p(-unit)

    def scaled(self, factor: float) -> Exponential:
        return Exponential(self.mean * factor)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Its logarithm is normal with standard deviation `sigma`; half of all are below `median`."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        _positive(median=self.median)
        _not_negative(sigma=self.sigma)

    @property
    def mean(self) -> float:
        return self.median * exp(self.sigma**2 / 2)

    def at(self, unit: float) -> float:
        return self.median * exp(self.sigma * _normal(unit)) if unit else 0.0

    def scaled(self, factor: float) -> Lognormal:
        return Lognormal(self.median * factor, self.sigma)


@dataclass(frozen=True, slots=True)
class Weibull:
    """`shape` below 1 has a heavier tail than the exponential distribution, above 1 a lighter."""

    scale: float
    shape: float

    def __post_init__(self) -> None:
        _positive(scale=self.scale, shape=self.shape)

    @property
    def mean(self) -> float:
        return self.scale * gamma(1 + 1 / self.shape)

    def at(self, unit: float) -> float:
        power: float = (-log1p(-unit)) ** (1 / self.shape)
        return self.scale * power

    def scaled(self, factor: float) -> Weibull:
        return Weibull(self.scale * factor, self.shape)


@dataclass(frozen=True, slots=True)
class Pareto:
    """At least `least`, with a tail that falls as x^-alpha, at most `most` where that is set.

    Without `most`, `alpha` must be above 1: else there is no mean.
    """

    least: float
    alpha: float
    most: float | None = None

    def __post_init__(self) -> None:
        _positive(least=self.least, alpha=self.alpha)
        if self.most is None and self.alpha <= 1:
            raise ValueError(f"alpha must be above 1 where there is no most, not {self.alpha}")
        if self.most is not None and not (isfinite(self.most) and self.most > self.least):
            raise ValueError(f"most ({self.most}) must be above least ({self.least})")

    @property
    def mean(self) -> float:
        if self.most is None:
            return self.least * self.alpha / (self.alpha - 1)
        share = self.least / self.most
        if self.alpha == 1:
            return self.least / (1 - share) * -log(share)
        above = self.alpha - 1
        kept: float = (1 - share**above) / (1 - share**self.alpha)
        return self.least * self.alpha / above * kept

    def at(self, unit: float) -> float:
        if self.most is not None:
            unit *= 1 - (self.least / self.most) ** self.alpha
        power: float = (1 - unit) ** (-1 / self.alpha)
        return self.least * power

    def scaled(self, factor: float) -> Pareto:
        most = None if self.most is None else self.most * factor
        return Pareto(self.least * factor, self.alpha, most)


@dataclass(frozen=True, slots=True)
class Empirical:
    """One of `values`, each as likely: what was measured, drawn again."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("there must be at least one value")
        for value in self.values:
            _not_negative(value=value)
        object.__setattr__(self, "values", tuple(sorted(self.values)))

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def at(self, unit: float) -> float:
        return self.values[int(unit * len(self.values))]

    def scaled(self, factor: float) -> Empirical:
        return Empirical(tuple(value * factor for value in self.values))


@dataclass(frozen=True, slots=True)
class Mixture:
    """One of several draws, by weight: mostly short tasks, and some that are long.

    `at` has the right distribution, but is no sorted quantile: a unit chooses the part first, and
    its place within that.
    """

    parts: tuple[tuple[float, Distribution], ...]
    """(weight, draw)"""
    _ends: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("there must be at least one part")
        for weight, _ in self.parts:
            _positive(weight=weight)
        sums = list(accumulate(weight for weight, _ in self.parts))
        object.__setattr__(self, "_ends", tuple(end / sums[-1] for end in sums))

    @property
    def mean(self) -> float:
        whole = sum(weight for weight, _ in self.parts)
        return sum(weight * draw.mean for weight, draw in self.parts) / whole

    def at(self, unit: float) -> float:
        part = bisect_right(self._ends, unit)
        start = self._ends[part - 1] if part else 0.0
        # Rounding may bring the share to 1, which is no unit.
        share = min((unit - start) / (self._ends[part] - start), 1 - 2**-53)
        return self.parts[part][1].at(share)

    def scaled(self, factor: float) -> Mixture:
        return replace(self, parts=tuple((w, draw.scaled(factor)) for w, draw in self.parts))


def stage_sizes(template: JobTemplate, tasks: int) -> dict[str, int]:
    """By stage; ValueError where the stages cannot be put into an order."""
    found: dict[str, int] = {}
    left = list(template.stages)
    while left:
        ready = [stage for stage in left if all(name in found for name in stage.after)]
        for stage in ready:
            found[stage.name] = _stage_size(stage, found, tasks)
        left = [stage for stage in left if stage not in ready]
        if not ready:
            raise ValueError("the stages run in a circle")
    return found


def _stage_size(stage: StageTemplate, found: dict[str, int], tasks: int) -> int:
    if not stage.after:
        return tasks
    if stage.gather == "*":
        return 1
    before = max(found[name] for name in stage.after)
    return before if stage.gather is None else min(stage.groups, before)


def item_joins(template: JobTemplate) -> list[StageTemplate]:
    """The stages that follow several item by item, which must have equally many tasks."""
    return [stage for stage in template.stages if stage.gather is None and len(stage.after) > 1]


def find_unequal_join(template: JobTemplate, tasks: int) -> StageTemplate | None:
    """The first of the joins that follows stages with unequal numbers of tasks; ValueError as
    in `stage_sizes`."""
    joined = item_joins(template)
    sizes = stage_sizes(template, tasks) if joined else {}
    return next((one for one in joined if len({sizes[name] for name in one.after}) > 1), None)


def unequal_join_message(stage: StageTemplate) -> str:
    """What is wrong with an unequal join."""
    which = " and ".join(f"'{name}'" for name in stage.after)
    return (
        f"The stage '{stage.name}' takes the results of {which} item by item, and those have not "
        "equally many tasks."
    )


UNEQUAL_JOIN_REMEDY = "Write gather: all, or let it follow stages with as many tasks."
