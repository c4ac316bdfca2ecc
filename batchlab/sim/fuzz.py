"""Fuzzing: run one random world per seed, shrink failures, and print the commands to replay the failures.

Invariant: the result of a seed depends only on the seed, the fault rates (weather), and the faults. The sums over seeds
depend neither on the order of the seeds nor on the number of processes.
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
from batchlab.sim.actors import ActorKilled, SimulationError, Violated
from batchlab.sim.event_loop import Crashed, Deadlock, StepLimit
from batchlab.sim.faults import Fault, FaultKind, Weather
from batchlab.sim.process_pool import ProcessDeath, spread

T = TypeVar("T", bound=Hashable)

MAX_TRIES = 400


@dataclass(frozen=True, slots=True)
class ShrinkResult(Generic[T]):
    """Result of `shrink`: the smallest list of parts that still fails. `least` is False if the limit of tries or time
    ended the search early."""

    parts: tuple[T, ...]
    tries: int
    least: bool


class _SearchLimit(Exception):
    """The search has used up its tries or its time."""


def shrink(
    parts: Sequence[T],
    attempt: Callable[[tuple[T, ...]], Sequence[T] | None],
    *,
    tries: int = MAX_TRIES,
    out_of_time: Callable[[], bool] = lambda: False,
) -> ShrinkResult[T] | None:
    """Return the fewest of `parts` (all different) for which `attempt` does not return None, by delta debugging.

    `attempt` returns the parts that took effect, and the search drops all other parts at once. Return None if `attempt`
    returns None for the whole list.
    """
    search = _Search(tuple(parts), attempt, tries, out_of_time)
    try:
        if not search.holds(()):
            if not search.holds(search.parts):
                return None
            search.halve()
    except _SearchLimit:
        return ShrinkResult(search.parts, search.tried, least=False)
    return ShrinkResult(search.parts, search.tried, least=True)


@dataclass
class _Search(Generic[T]):
    parts: tuple[T, ...]
    attempt: Callable[[tuple[T, ...]], Sequence[T] | None]
    max_tries: int
    out_of_time: Callable[[], bool]
    vain: set[tuple[T, ...]] = field(default_factory=set)
    tried: int = 0

    def holds(self, parts: tuple[T, ...]) -> bool:
        """Return whether `parts` reproduce the result, and if so, drop all other parts."""
        if parts in self.vain:
            return False
        if self.tried >= self.max_tries or self.out_of_time():
            raise _SearchLimit
        self.tried += 1
        needed = self.attempt(parts)
        if needed is None:
            self.vain.add(parts)
            return False
        role = set(needed)
        self.parts = tuple(part for part in parts if part in role)
        return True

    def halve(self) -> None:
        """Run Zeller's ddmin: test ever smaller pieces and their complements until every remaining part is needed."""
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
    "audited": trial.AUDITED,
    "crashes": trial.CRASHES,
    "dependent": trial.DEPENDENT,
    "gpus": trial.GPUS,
    "lies": trial.LIES,
    "mended": trial.MENDED,
    "shares": trial.SHARES,
    "orphans": trial.ORPHANS,
    "speculative": trial.SPECULATIVE,
    "storage": trial.STORAGE,
    "storm": trial.STORM,
    "timed": trial.TIMED,
}
FAIR = "none"
"""Text form of an empty list of faults, because an empty argument easily gets lost in a shell."""

MAX_SHRINK_S = 180.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Seed whose world broke a promise of the grid after the injection of `faults`."""

    seed: int
    promise: str
    """Name of the broken promise, which is I1 to I8, a step of the protocol, or the kind of error.

    A smaller list of faults counts only if the list breaks the same promise.
    """
    text: str
    faults: tuple[Fault, ...]
    trace: str = ""
    """Place in the code that raised an unexpected error."""


@dataclass(frozen=True, slots=True)
class SeedResult:
    """Result of a seed: a report or a failure."""

    seed: int
    faults: tuple[Fault, ...]
    report: trial.Report | None
    failure: Failure | None


def try_seed(seed: int, weather: str) -> SeedResult:
    """Run a seed's world with the faults drawn from the rates in `weather`."""
    return replay(seed, weather, None)


def replay(seed: int, weather: str, only: Iterable[Fault] | None, log: list[str] | None = None) -> SeedResult:
    """Run a seed's world with the faults in `only`, or with faults drawn from the rates in `weather` if `only` is None.

    A fault that does not fit its call does not happen. The lines of the event log are appended to `log`.
    """
    kind = WEATHERS[weather]
    faults = trial.faults_for(seed, kind) if only is None else trial.replay_faults(seed, only)
    try:
        report = trial.run(seed, kind, faults=faults, log=log)
    except (Exception, ActorKilled) as error:  # noqa: BLE001 - any error is a failure of the seed
        origin = error.__cause__ if isinstance(error, Crashed) and error.__cause__ else error
        trace = "" if isinstance(origin, SimulationError) else "".join(format_exception(origin))
        text = str(origin) if isinstance(origin, Violated) else f"{type(error).__name__}: {error}"
        failure = Failure(seed, promise(origin), text, tuple(faults.injected), trace)
        return SeedResult(seed, failure.faults, None, failure)
    return SeedResult(seed, tuple(faults.injected), report, None)


def promise(error: BaseException) -> str:
    """Return the name of the broken promise, or the kind of the error.

    A world that stops, or that never ends, breaks promise I7.
    """
    if isinstance(error, Deadlock | StepLimit):
        return "I7"
    broken = re.match(r"(.+?) is violated", str(error))
    return broken[1] if isinstance(error, Violated) and broken else type(error).__name__


@contextmanager
def silence() -> Iterator[None]:
    """Turn off logging, because the logs would report only the injected faults."""
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
    """Sum of the virtual time of all seeds in whole milliseconds.

    A sum of floats would depend on the order of the seeds.
    """
    states: Counter[str] = field(default_factory=Counter)
    """Number of jobs by their final state. A retried job counts by the state of its last round."""
    times: Counter[FaultKind] = field(default_factory=Counter)
    worlds: Counter[FaultKind] = field(default_factory=Counter)
    """Number of seeds in which each kind of fault happened."""
    failures: list[Failure] = field(default_factory=list)

    def add(self, result: SeedResult) -> None:
        """Add the result of one seed. The faults of a failed seed also count."""
        self.seeds += 1
        kinds = Counter(fault.kind for fault in result.faults)
        self.times += kinds
        self.worlds += Counter(set(kinds))
        if result.failure:
            self.failures.append(result.failure)
            self.failures.sort(key=lambda failure: failure.seed)
        if report := result.report:
            self.tasks += report.tasks
            self.starts += report.starts
            self.managers += report.managers
            self.virtual_ms += round(report.virtual_s * 1000)
            self.states += Counter(state.value for state in report.states)


def campaign(seeds: Iterable[int], weather: str, processes: int) -> Generator[SeedResult, None, None]:
    """Try seeds in several processes. Closing the generator stops the processes at once."""
    work = partial(_quietly, try_seed, weather=weather)
    for seed, result in spread(work, seeds, processes):
        yield _lost_seed(seed, result) if isinstance(result, ProcessDeath) else result


def _quietly(work: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    with silence():
        return work(*args, **kwargs)


def _lost_seed(seed: int, end: ProcessDeath) -> SeedResult:
    text = f"its process ended with exit code {end.exit_code} instead of an answer"
    return SeedResult(seed, (), None, Failure(seed, "Died", text, ()))


# --- Fewest faults -------------------------------------------------------------------------------


def fewest(
    failure: Failure, weather: str, now_s: Callable[[], float], limit_s: float = MAX_SHRINK_S
) -> ShrinkResult[Fault] | None:
    """Return the fewest of a failure's faults that break the same promise.

    Return None if a replay does not break the promise. The search does not start further attempts after `limit_s`
    seconds on the clock `now_s`.
    """
    end_s = now_s() + limit_s

    def attempt(only: tuple[Fault, ...]) -> Sequence[Fault] | None:
        again = replay(failure.seed, weather, only).failure
        return again.faults if again and again.promise == failure.promise else None

    return shrink(failure.faults, attempt, out_of_time=lambda: now_s() > end_s)


def all_fewest(
    failures: Sequence[Failure], weather: str, processes: int, now_s: Callable[[], float]
) -> Generator[tuple[Failure, ShrinkResult[Fault] | None], None, None]:
    """Shrink failures in several processes. `now_s` is pickled, because the processes call it."""
    work = partial(_quietly, fewest, weather=weather, now_s=now_s)
    for failure, result in spread(work, failures, processes):
        yield failure, None if isinstance(result, ProcessDeath) else result


# --- On the command line -------------------------------------------------------------------------


def write(faults: Sequence[Fault]) -> str:
    """Return `faults` in the text form that `read` accepts, without characters that a shell interprets."""
    words = (f"{fault.actor.replace(' ', '+')}:{fault.call}:{fault.kind.value}" for fault in faults)
    return ",".join(words) or FAIR


def read(text: str) -> list[Fault]:
    """Return the faults in `text`. A malformed text raises UsageError."""
    if text == FAIR:
        return []
    return [_read(part) for part in text.split(",")]


def _read(part: str) -> Fault:
    match = re.fullmatch(r"(\S+):(\d{1,9}):(\w+)", part)
    if match is None:
        raise UsageError(
            f"{part!r} is not a fault: a fault has the form ACTOR:CALL:KIND.",
            remedy=f"Write for example manager-1:41:kill_after, several with commas, or {FAIR}.",
        )
    actor, call, kind = match.groups()
    kinds = {fault_kind.value: fault_kind for fault_kind in FaultKind}
    if kind not in kinds:
        raise UsageError(f"The kind of fault {kind!r} does not exist.", remedy=f"The kinds are {', '.join(kinds)}.")
    return Fault(actor.replace("+", " "), int(call), kinds[kind])


def command(failure: Failure, weather: str, only: Sequence[Fault] | None = None) -> str:
    """Return the shell command that replays a failure.

    `only` is the smallest list of faults, or None if the list is not known.
    """
    words = ["batchlab sim replay", str(failure.seed)]
    if only is not None and len(only) < len(failure.faults):
        words.append(f"--only {write(only)}")
    if weather != "all":
        words.append(f"--weather {weather}")
    return " ".join(words)
