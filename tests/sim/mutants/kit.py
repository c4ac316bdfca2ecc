"""The definition of planted bugs, their installation in the product, and the search for worlds that show them.

Invariant: a mutant that does not fit the product raises an error and never changes nothing. An error in a mutant's own
code never counts as an error of the product.
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
from batchlab.sim.faults import Fault
from batchlab.sim.fuzz import Failure

F = TypeVar("F", bound=Callable[..., Any])

ENOUGH = 500
"""The number of seeds, from 0, within which the simulator must catch every mutant."""

KNOWN = Path(__file__).with_name("known.json")
"""The file in which `calibrate` stores a seed that shows each mutant. The file saves CI the search. An outdated seed
only costs time."""

PATIENT, AND_MORE = 3, 20_000
"""The limits of a mutant's world. The world counts as hanging (I7) after PATIENT times the steps of the unchanged
product, plus AND_MORE steps."""


class Unfit(Exception):
    """A mutant does not fit the product any more and needs an update."""


class Plant:
    """The installer of one mutant's changes in the product. `patch` undoes the changes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.slips: list[BaseException] = []
        """Errors in the mutant's own code, which the product may have caught."""
        self._patch = patch

    def method(self, owner: type, name: str) -> Callable[[F], F]:
        """Return a decorator that replaces `owner`'s own method by the function."""
        if name not in vars(owner):
            raise Unfit(f"{owner.__name__} has no method {name} of its own")

        def put(made: F) -> F:
            self._patch.setattr(owner, name, self._fitted(made, vars(owner)[name]))
            return made

        return put

    def property(self, owner: type, name: str) -> Callable[[F], F]:
        """Return a decorator that replaces a property of `owner` by the function."""
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
        """Return a decorator that replaces `original` by the function in every module that imports it."""

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
        """Let readers accept outcomes whose parts do not match their bundle.

        Otherwise, the readers refuse the mutant's outcomes, which proves nothing about the promises.
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
    """One planted bug. In worlds of the kind `weather`, a violation of one of the promises in `shows` catches the
    bug."""

    name: str
    plant: Planting
    shows: frozenset[str]
    weather: str = "all"

    @property
    def broken(self) -> str:
        """Return the description of the bug and of the promise that it breaks, on one line."""
        return " ".join((self.plant.__doc__ or "").split())


MUTANTS: list[Mutant] = []


def planted(*shows: str, weather: str = "all") -> Callable[[Planting], Planting]:
    """Return a decorator that registers the function as a mutant under its own name."""

    def note(plant: Planting) -> Planting:
        name = plant.__name__.replace("_", " ")
        MUTANTS.append(Mutant(name, plant, frozenset(shows), weather))
        return plant

    return note


@dataclass(frozen=True, slots=True)
class Known:
    """A seed that has shown a mutant, and the promise that broke in its world."""

    seed: int
    promise: str


def known() -> dict[str, Known]:
    """Return the stored seeds by the mutants' names, from the last calibration."""
    return {name: Known(**one) for name, one in json.loads(KNOWN.read_text()).items()}


# --- The search ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """The result of one world, with its faults and the number of its steps."""

    failure: Failure | None
    faults: tuple[Fault, ...]
    steps: int


@cache
def unmutated(seed: int, weather: str = "all") -> Look:
    """Run the unchanged product in a world. All tests of a process share the result."""
    with pytest.MonkeyPatch.context() as patch:
        return _look(patch, seed, weather)


def check_worlds(seeds: Iterable[int], weather: str) -> None:
    """Check that the unchanged product breaks no promise in the worlds of the weather with these seeds."""
    for seed in seeds:
        if failure := unmutated(seed, weather).failure:
            pytest.fail(f"seed {seed}: {failure.text}\n{fuzz.command(failure, weather, None)}\n{failure.trace}")


def mutated(mutant: Mutant, seed: int) -> Look:
    """Run the product with the mutant in a world. Raise Unfit if the mutant does not fit the product."""
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
        result = fuzz.try_seed(seed, weather)
    return Look(result.failure, result.faults, sum(loop.steps for loop in loops))


@dataclass(frozen=True, slots=True)
class Hunt:
    """The result of a search over seeds: the failure that shows the mutant, and earlier failures of other promises."""

    caught: Failure | None
    others: tuple[Failure, ...]


def hunt(mutant: Mutant, seeds: Iterable[int]) -> Hunt:
    """Search for the first seed in which the mutant breaks one of its promises and the unchanged product breaks
    none."""
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
    """Return the seeds to try, beginning with the stored one."""
    hint = known().get(mutant.name)
    return chain([hint.seed] if hint else [], range(ENOUGH))
