"""Many seeds, each a random world: what was injected, what broke, and how to see it again.

Invariant: what a seed comes to is a function of the seed, the weather and the faults it is left
with; so are the sums over seeds, in whatever order and by however many processes they were tried.

The fewest of a list's parts that still do what the whole list does: delta debugging.

Invariant: what it returns was tried and did it, but for parts that played no role. It depends on
nothing but the list and what the attempts come to, as long as time does not run out.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from traceback import format_exception
from typing import Any, Generic, TypeVar

from batchlab.core.errors import UsageError
from batchlab.sim import trial
from batchlab.sim.actors import ActorKilled, SimulationError
from batchlab.sim.event_loop import Crashed, Deadlock, StepLimit
from batchlab.sim.faults import Fault, FaultKind, Faults, Weather
from batchlab.sim.process_pool import Died, spread
from batchlab.sim.runtime_checks import Violated

T = TypeVar("T", bound=Hashable)

TRIES = 400


@dataclass(frozen=True, slots=True)
class Shrunk(Generic[T]):
    """`least` is True where nothing more can be left out, False where tries or time ran out."""

    parts: tuple[T, ...]
    tries: int
    least: bool


class _Enough(Exception):
    """Tries or time have run out."""


def shrink(
    parts: Sequence[T],
    attempt: Callable[[tuple[T, ...]], Sequence[T] | None],
    *,
    tries: int = TRIES,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Shrunk[T] | None:
    """The fewest of `parts` (all different) for which `attempt` still does not return None.

    `attempt` returns those of the parts it was given that played a role; the others are left out
    at once. None where not even the whole list does it.
    """
    search = _Search(tuple(parts), attempt, tries, out_of_time)
    try:
        if not search.holds(()):
            if not search.holds(search.parts):
                return None
            search.halve()
    except _Enough:
        return Shrunk(search.parts, search.tried, least=False)
    return Shrunk(search.parts, search.tried, least=True)


class _Search(Generic[T]):
    def __init__(
        self,
        parts: tuple[T, ...],
        attempt: Callable[[tuple[T, ...]], Sequence[T] | None],
        tries: int,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._attempt = attempt
        self._tries = tries
        self._out_of_time = out_of_time
        self._vain: set[tuple[T, ...]] = set()
        self.parts = parts
        self.tried = 0

    def holds(self, parts: tuple[T, ...]) -> bool:
        """Whether these do it; if so, they are what is left."""
        if parts in self._vain:
            return False
        if self.tried >= self._tries or self._out_of_time():
            raise _Enough
        self.tried += 1
        needed = self._attempt(parts)
        if needed is None:
            self._vain.add(parts)
            return False
        role = set(needed)
        self.parts = tuple(part for part in parts if part in role)
        return True

    def halve(self) -> None:
        """Zeller's ddmin: ever smaller pieces, alone or left out. It ends where no single part can
        be left out."""
        pieces = 2
        while len(self.parts) > 1:
            whole = self.parts
            size = -(-len(whole) // pieces)
            starts = range(0, len(whole), size)
            if any(self.holds(whole[at : at + size]) for at in starts):
                pieces = 2
            elif any(self.holds(whole[:at] + whole[at + size :]) for at in starts):
                pieces = max(pieces - 1, 2)
            elif size == 1:
                return
            else:
                pieces = min(pieces * 2, len(whole))


R = TypeVar("R")

WEATHERS: Mapping[str, Weather] = {
    "accounts": trial.ACCOUNTS,
    "all": trial.ALL,
    "crashes": trial.CRASHES,
    "lies": trial.LIES,
    "storage": trial.STORAGE,
    "storm": trial.STORM,
    "timed": trial.TIMED,
}
FAIR = "none"
"""How an empty list of faults is written: an empty argument is easily lost in a shell."""

SHRINK_S = 180.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed that broke a promise; `faults` are those that had happened until then."""

    seed: int
    promise: str
    """I1 to I7, a step of the protocol, or the kind of error: fewer faults must lead to the same.
    """
    text: str
    faults: tuple[Fault, ...]
    trace: str = ""
    """Where an error was raised that nobody foresaw."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What a seed came to: a report or a failure."""

    seed: int
    faults: tuple[Fault, ...]
    report: trial.Report | None
    failure: Failure | None


def try_seed(seed: int, weather: str) -> Tried:
    """Run a seed's world with the faults that its weather draws."""
    return replay(seed, weather, None)


def replay(
    seed: int, weather: str, only: Iterable[Fault] | None, log: list[str] | None = None
) -> Tried:
    """Run a seed's world with `only` these faults, of which those that fit no call do not happen;
    None is what the weather draws. The lines of the event log are appended to `log`."""
    kind = WEATHERS[weather]
    faults = trial.faults_for(seed, kind) if only is None else trial.replayed(seed, only)
    try:
        report = trial.run(seed, kind, faults=faults, log=log)
    except (Exception, ActorKilled) as error:  # noqa: BLE001 - whatever it is, the seed has failed
        failure = _failure(seed, error, faults)
        return Tried(seed, failure.faults, None, failure)
    return Tried(seed, tuple(faults.injected), report, None)


def _failure(seed: int, error: BaseException, faults: Faults) -> Failure:
    origin = error.__cause__ if isinstance(error, Crashed) and error.__cause__ else error
    trace = "" if isinstance(origin, SimulationError) else "".join(format_exception(origin))
    text = str(origin) if isinstance(origin, Violated) else f"{type(error).__name__}: {error}"
    return Failure(seed, promise(origin), text, tuple(faults.injected), trace)


def promise(error: BaseException) -> str:
    """What the error breaks: the promise's name, else the error's kind. A world in which nothing
    happens any more, or in which something happens for ever, breaks I7."""
    if isinstance(error, Deadlock | StepLimit):
        return "I7"
    broken = re.match(r"(.+?) is violated", str(error))
    return broken[1] if isinstance(error, Violated) and broken else type(error).__name__


@contextmanager
def silence() -> Iterator[None]:
    """Within, the library logs nothing: injected faults are all it would tell of."""
    log = logging.getLogger("batchlab")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


# --- Many seeds ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Sums over the seeds tried so far."""

    seeds: int = 0
    tasks: int = 0
    starts: int = 0
    managers: int = 0
    virtual_ms: int = 0
    """Whole milliseconds per seed, since a sum of floats depends on their order."""
    states: Counter[str] = field(default_factory=Counter)
    """How jobs ended, most of all; retried ones count by their last round."""
    times: Counter[FaultKind] = field(default_factory=Counter)
    worlds: Counter[FaultKind] = field(default_factory=Counter)
    """In how many seeds each kind happened."""
    failures: list[Failure] = field(default_factory=list)

    def add(self, tried: Tried) -> None:
        """Count one more. A seed that failed has no report, so only its faults count."""
        self.seeds += 1
        kinds = Counter(fault.kind for fault in tried.faults)
        self.times += kinds
        self.worlds += Counter(set(kinds))
        if tried.failure:
            self.failures.append(tried.failure)
            self.failures.sort(key=lambda one: one.seed)
        if report := tried.report:
            self.tasks += report.tasks
            self.starts += report.starts
            self.managers += report.managers
            self.virtual_ms += round(report.virtual_s * 1000)
            self.states += Counter(state.value for state in report.states)


def campaign(seeds: Iterable[int], weather: str, processes: int) -> Generator[Tried, None, None]:
    """Try seeds in several processes; close the generator to end them at once."""
    work = partial(_quietly, try_seed, weather=weather)
    for seed, tried in spread(work, seeds, processes):
        yield _lost(seed, tried) if isinstance(tried, Died) else tried


def _quietly(work: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    with silence():
        return work(*args, **kwargs)


def _lost(seed: int, end: Died) -> Tried:
    text = f"its process ended with exit code {end.exit_code} instead of an answer"
    return Tried(seed, (), None, Failure(seed, "Died", text, ()))


# --- Fewest faults -------------------------------------------------------------------------------


def fewest(
    failure: Failure, weather: str, now_s: Callable[[], float], limit_s: float = SHRINK_S
) -> Shrunk[Fault] | None:
    """The fewest of a failure's faults that break the same promise; None where a replay does not
    break it. `limit_s` bounds the search in seconds of `now_s`, but for the last attempt."""
    end_s = now_s() + limit_s

    def attempt(only: tuple[Fault, ...]) -> Sequence[Fault] | None:
        again = replay(failure.seed, weather, only).failure
        return again.faults if again and again.promise == failure.promise else None

    return shrink(failure.faults, attempt, out_of_time=lambda: now_s() > end_s)


def all_fewest(
    failures: Sequence[Failure], weather: str, processes: int, now_s: Callable[[], float]
) -> Generator[tuple[Failure, Shrunk[Fault] | None], None, None]:
    """Shrink failures in several processes; `now_s` is pickled."""
    work = partial(_quietly, fewest, weather=weather, now_s=now_s)
    for failure, found in spread(work, failures, processes):
        yield failure, None if isinstance(found, Died) else found


# --- On the command line -------------------------------------------------------------------------


def written(faults: Sequence[Fault]) -> str:
    """`faults` as `read` takes them, without a character that a shell would touch."""
    words = (f"{one.actor.replace(' ', '+')}:{one.call}:{one.kind.value}" for one in faults)
    return ",".join(words) or FAIR


def read(text: str) -> list[Fault]:
    """The faults that `text` names; UsageError."""
    if text == FAIR:
        return []
    return [_read(part) for part in text.split(",")]


def _read(part: str) -> Fault:
    found = re.fullmatch(r"(\S+):(\d{1,9}):(\w+)", part)
    if found is None:
        raise UsageError(
            f"{part!r} is no fault: it is not ACTOR:CALL:KIND.",
            remedy=f"Write for example manager-1:41:kill_after, several with commas, or {FAIR}.",
        )
    actor, call, kind = found.groups()
    kinds = {one.value: one for one in FaultKind}
    if kind not in kinds:
        raise UsageError(f"There is no fault {kind!r}.", remedy=f"There are {', '.join(kinds)}.")
    return Fault(actor.replace("+", " "), int(call), kinds[kind])


def command(failure: Failure, weather: str, only: Sequence[Fault] | None = None) -> str:
    """The command that replays a failure; `only` the fewest faults where they are known."""
    words = ["batchlab sim replay", str(failure.seed)]
    if only is not None and len(only) < len(failure.faults):
        words.append(f"--only {written(only)}")
    if weather != "all":
        words.append(f"--weather {weather}")
    return " ".join(words)
