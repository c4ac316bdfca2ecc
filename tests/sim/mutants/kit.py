"""How a planted bug is written down, put into the product, and hunted by the simulator.

Invariant: a mutant that no longer fits the product is an error, never a mutant that changes
nothing; and an error in a mutant's own code is never taken for the product's.
"""

from __future__ import annotations

import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from batchlab.core.model import Bundle, Follow, TaskSet
from batchlab.core.protocol import json_format
from batchlab.sim import fuzz, trial
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.fuzz import Failure

F = TypeVar("F", bound=Callable[..., Any])

ENOUGH = 500
"""Seeds, from 0, within which every mutant must be caught."""

KNOWN = Path(__file__).with_name("known.json")
"""Where `calibrate` writes a seed that shows each mutant. It saves CI the search; a stale one costs
time only."""

PATIENT, AND_MORE = 3, 20_000
"""A mutant's world is taken to hang (I7) after PATIENT times the steps in which the product as it
is comes to an end there, AND_MORE."""


class Unfit(Exception):
    """A mutant does not fit the product any more: bring it up to date."""


class Plant:
    """Puts one mutant's changes into the product, until `patch` is undone."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.slips: list[BaseException] = []
        """Errors that the mutant's own code has made; the product may have swallowed them."""
        self._patch = patch

    def method(self, owner: type, name: str) -> Callable[[F], F]:
        """Decorator: the function takes the place of `owner`'s own method."""
        if name not in vars(owner):
            raise Unfit(f"{owner.__name__} has no method {name} of its own")

        def put(made: F) -> F:
            self._patch.setattr(owner, name, self._fitted(made, vars(owner)[name]))
            return made

        return put

    def property(self, owner: type, name: str) -> Callable[[F], F]:
        """Decorator: as `method`, for a property."""
        original = vars(owner).get(name)
        if not isinstance(original, property):
            raise Unfit(f"{owner.__name__} has no property {name} of its own")
        getter = original.fget
        assert getter is not None

        def put(made: F) -> F:
            self._patch.setattr(owner, name, property(self._fitted(made, getter)))
            return made

        return put

    def everywhere(self, original: Callable[..., Any]) -> Callable[[F], F]:
        """Decorator: the function takes the place of `original` in every module that has it."""

        def put(made: F) -> F:
            fitted = self._fitted(made, original)
            for name, module in sorted(sys.modules.items()):
                if not name.startswith("batchlab."):
                    continue
                for key, value in list(vars(module).items()):
                    if value is original:
                        self._patch.setattr(module, key, fitted)
            return made

        return put

    def unchecked_parts(self) -> None:
        """Let readers accept outcomes whose parts do not add up to their bundle.

        Otherwise the reader refuses the mutant's outcomes, which proves nothing about the promises.
        """

        @self.everywhere(json_format.check_parts)
        def check_parts(
            bundle: Bundle, succeeded: TaskSet, failed: TaskSet, cancelled: TaskSet, follows: Sequence[Follow]
        ) -> None:
            pass

    def _fitted(self, made: F, original: Callable[..., Any]) -> F:
        if inspect.iscoroutinefunction(made) != inspect.iscoroutinefunction(original):
            raise Unfit(f"only one of {made.__qualname__} and {original.__qualname__} is async")
        if list(inspect.signature(made).parameters) != list(inspect.signature(original).parameters):
            raise Unfit(f"{original.__qualname__} takes other parameters than its mutant")
        return cast(F, self._watched(made))

    def _watched(self, made: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(made):

            @wraps(made)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                with self._noting_slips():
                    return await made(*args, **kwargs)

            return call_async

        @wraps(made)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._noting_slips():
                return made(*args, **kwargs)

        return call

    @contextmanager
    def _noting_slips(self) -> Iterator[None]:
        try:
            yield
        except (AttributeError, NameError, TypeError) as error:
            (*_, last) = traceback.extract_tb(error.__traceback__)
            if "/tests/sim/" in last.filename:
                self.slips.append(error)
            raise


Planting = Callable[[Plant], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted bug. In worlds of `weather`, one of the promises in `shows` may catch it."""

    name: str
    plant: Planting
    shows: frozenset[str]
    weather: str = "all"

    @property
    def broken(self) -> str:
        """What somebody would have written and what that breaks, on one line."""
        return " ".join((self.plant.__doc__ or "").split())


MUTANTS: list[Mutant] = []


def planted(*shows: str, weather: str = "all") -> Callable[[Planting], Planting]:
    """Decorator: notes the function as a mutant under its own name."""

    def note(plant: Planting) -> Planting:
        name = plant.__name__.replace("_", " ")
        MUTANTS.append(Mutant(name, plant, frozenset(shows), weather))
        return plant

    return note


@dataclass(frozen=True, slots=True)
class Known:
    """A seed that was seen to show a mutant, and the promise that broke there."""

    seed: int
    promise: str


def known() -> dict[str, Known]:
    """By name, as of the last calibration."""
    return {name: Known(**one) for name, one in json.loads(KNOWN.read_text()).items()}


# --- The hunt ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What one world came to."""

    failure: Failure | None
    steps: int


@cache
def unmutated(seed: int, weather: str = "all") -> Look:
    """The product as it is."""
    with pytest.MonkeyPatch.context() as patch:
        return _look(patch, seed, weather)


def mutated(mutant: Mutant, seed: int) -> Look:
    """The product with the mutant in it; Unfit where the mutant does not fit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "MAX_STEPS", PATIENT * unmutated(seed, mutant.weather).steps + AND_MORE)
        plant = Plant(patch)
        mutant.plant(plant)
        seen = _look(patch, seed, mutant.weather)
    if plant.slips:
        raise Unfit(f"{mutant.name} at seed {seed}") from plant.slips[0]
    return seen


def _look(patch: pytest.MonkeyPatch, seed: int, weather: str) -> Look:
    loops: list[SimLoop] = []

    class Counting(SimLoop):
        def __init__(self, *, inline_executor: bool = False) -> None:
            super().__init__(inline_executor=inline_executor)
            loops.append(self)

    patch.setattr(trial, "SimLoop", Counting)
    with fuzz.silence():
        failure = fuzz.try_seed(seed, weather).failure
    return Look(failure, sum(loop.steps for loop in loops))


@dataclass(frozen=True, slots=True)
class Hunt:
    """What a search over seeds found: the failure that shows the mutant, and those before it that
    say something else."""

    caught: Failure | None
    others: tuple[Failure, ...]


def hunt(mutant: Mutant, seeds: Iterable[int]) -> Hunt:
    """Search for the first seed that shows the mutant by a promise that it is meant to break,
    where the product as it is breaks none."""
    others: list[Failure] = []
    for seed in seeds:
        failure = mutated(mutant, seed).failure
        if failure is None or unmutated(seed, mutant.weather).failure is not None:
            continue
        if failure.promise in mutant.shows:
            return Hunt(failure, tuple(others))
        others.append(failure)
    return Hunt(None, tuple(others))


def seeds_for(mutant: Mutant) -> Iterable[int]:
    """All there are to try; first the one that is known to show it."""
    hint = known().get(mutant.name)
    return chain([hint.seed] if hint else [], range(ENOUGH))
