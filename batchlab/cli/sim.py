"""Commands of `batchlab sim`, which test the grid in the simulator with random faults, for one seed or many seeds.

Invariant: exit code 0 means that every guarantee held in every simulated run. The table of faults lists every kind of
fault, including faults that did not happen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from batchlab import __version__
from batchlab.cli import output
from batchlab.cli.groups import command_group
from batchlab.cli.options import JSON, argument, option
from batchlab.cli.output import INTERRUPTED, Stopped
from batchlab.cli.progress import bar
from batchlab.core.errors import UsageError
from batchlab.sim.faults import Fault, FaultKind
from batchlab.sim.fuzz import WEATHERS, Failure, SeedResult, ShrinkResult, Tally, command, write

MAX_SHRUNK_SEEDS = 3
"""Maximum number of failing seeds for which the smallest failing set of faults is searched. One bug usually breaks many
seeds.
"""
MAX_LOG_LINES = 20

app = command_group("sim")


WEATHER = option(
    "Injected faults: all, crashes (killed processes), storm (crashes and failing services), timed (all, with a "
    "schedule), lies (all, with lying workers), storage (all, with damaged objects), accounts (all, with recorded "
    "usage), orphans (all, with a time without a manager), dependent (all, with jobs that wait for other jobs), "
    "speculative (all, with slow workers and speculative copies), mended (all, with mended inputs), gpus (all, with "
    "GPUs), audited (all, with an audit log), or shares (a fair-share policy, with rare faults).",
    "NAME",
    default="all",
)


@app.callback()
def sim_() -> None:
    """Test the grid's guarantees in simulation, with injected faults.

    \b
    Example: batchlab sim fuzz --seeds 500
    """


@app.command()
def fuzz(
    seeds: int = option("Number of seeds, each of which defines one random world.", "N", default=500, min=1),
    first: int = option("First of the consecutive seeds.", "SEED", "--from", default=0, min=0),
    jobs: int | None = option(
        "Number of seeds that are simulated in parallel.", "N", show_default="the number of CPUs", min=1
    ),
    weather: str = WEATHER,
    stop_after: int = option("Number of failed seeds after which the command stops.", "N", default=10, min=1),
    report: Path | None = option("File to which the results are also written, as Markdown tables.", "FILE"),
    json: bool = JSON,
) -> None:
    """Simulate a random world for each seed, and check that the grid keeps every promise in each world.

    The command reduces each failure to the fewest faults that cause the failure. The exit code is 1
    if the grid breaks a promise.

    \b
    Example: batchlab sim fuzz --seeds 10000 --report long.md
    """
    _check_known(weather)
    if report:
        output.check_writable(report)
    begun_s = time.monotonic()
    campaign = Campaign(first, seeds, weather, min(jobs or os.cpu_count() or 1, seeds))
    interrupted = False
    try:
        _try_all(campaign, stop_after)
        _shrink(campaign)
    except (Stopped, KeyboardInterrupt):
        interrupted = True
        campaign.cut = campaign.cut or "It was interrupted."
    campaign.wall_s = time.monotonic() - begun_s
    if report:
        report.write_text(campaign.markdown(), encoding="utf-8")
    output.answer(json, campaign.to_json(), campaign.text())
    if interrupted or campaign.failures:
        raise typer.Exit(INTERRUPTED if interrupted else 1)


def _check_known(weather: str) -> None:
    if weather not in WEATHERS:
        raise UsageError(f"The weather {weather!r} does not exist.", remedy=f"Name one of {', '.join(WEATHERS)}.")


def _try_all(campaign: Campaign, stop_after: int) -> None:
    from batchlab.sim import fuzz

    seeds = range(campaign.first, campaign.first + campaign.wanted)
    tries = fuzz.campaign(seeds, campaign.weather, campaign.processes)
    with closing(tries), _progress(campaign.wanted) as show:
        for tried in tries:
            campaign.tally.add(tried)
            show(campaign.tally)
            if len(campaign.failures) >= stop_after and campaign.tally.seeds < campaign.wanted:
                campaign.cut = "It stopped there."
                return


def _shrink(campaign: Campaign) -> None:
    from batchlab.sim import fuzz

    first = campaign.failures[:MAX_SHRUNK_SEEDS]
    if first and sys.stderr.isatty():
        output.say(f"Shrinking {output.count(len(first), 'failure')} to the fewest faults…")
    results = fuzz.all_fewest(first, campaign.weather, campaign.processes, time.monotonic)
    with closing(results):
        for failure, shrunk in results:
            campaign.fewest[failure.seed] = shrunk


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Tally], None]]:
    begun_s = time.monotonic()
    with bar(30.0) as show:

        def count(tally: Tally) -> None:
            rate = tally.seeds / (time.monotonic() - begun_s)
            text = f"{tally.seeds:,} of {total:,} seeds, {len(tally.failures)} failed"
            show(tally.seeds, total, f"{text}, {rate:.1f} seeds/s")

        yield count


@app.command()
def replay(
    seed: int = argument("Seed of the simulated world.", "SEED", min=0),
    only: str | None = option(
        "List of faults in the form ACTOR:CALL:KIND,… or 'none', which replaces the random faults of --weather.",
        "FAULTS",
    ),
    weather: str = WEATHER,
    log: Path | None = option("File to which the complete event log of the simulation is written.", "FILE"),
) -> None:
    """Simulate the world of one seed again, and show the end of the simulation. The exit code is 1 if the grid breaks a
    promise.

    \b
    Example: batchlab sim replay 1234 --only manager-1:41:kill_after
    """
    from batchlab.sim import fuzz

    _check_known(weather)
    wanted = None if only is None else fuzz.read(only)
    if log:
        output.check_writable(log)
    lines: list[str] = []
    with fuzz.silence():
        tried = fuzz.replay(seed, weather, wanted, lines)
    if log:
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    idle = [fault for fault in wanted or () if fault not in tried.faults]
    if idle:
        output.say(f"These fitted no call and did not happen: {fuzz.write(idle)}")
    output.show(_end_text(tried))
    if tried.failure:
        if log is None:
            tail = lines[-MAX_LOG_LINES:]
            output.show("\n".join([f"The last {len(tail)} of {len(lines):,} lines of the event log:", *tail]))
        raise typer.Exit(1)


def _end_text(tried: SeedResult) -> str:
    faults = output.count(len(tried.faults), "fault")
    if failure := tried.failure:
        text = f"Seed {tried.seed}, after {faults}: {output.clean(failure.text)}"
        return f"{text}\n\n{failure.trace}" if failure.trace else text
    report = tried.report
    assert report is not None
    numbers = ((report.tasks, "task"), (report.starts, "start"), (report.managers, "manager"))
    counts = ", ".join([faults, *(output.count(number, noun) for number, noun in numbers)])
    states = ", ".join(state.value for state in report.states)
    duration = f"{output.span(report.virtual_s)} of virtual time"
    return f"Seed {tried.seed} keeps every promise: {counts}, {duration}; its jobs: {states}"


FAULT_COLUMNS = ("fault", "times", "in seeds", "meaning")


@dataclass(slots=True)
class Campaign:
    """Random tests with `wanted` consecutive seeds from `first` on, and their results."""

    first: int
    wanted: int
    weather: str
    processes: int
    tally: Tally = field(default_factory=Tally)
    fewest: dict[int, ShrinkResult[Fault] | None] = field(default_factory=dict)
    """Smallest set of faults with which the test fails, by failed seed. The value is None if a replay with only the
    recorded faults succeeds.
    """
    wall_s: float = 0.0
    cut: str = ""
    """Reason why the tests ended before the last seed, or "" if all seeds were tested."""

    @property
    def failures(self) -> Sequence[Failure]:
        return self.tally.failures

    def replay(self, failure: Failure) -> str:
        """Return the command line that reproduces a failure with the smallest known set of faults."""
        shrunk = self.fewest.get(failure.seed)
        return command(failure, self.weather, shrunk.parts if shrunk else None)

    def text(self) -> str:
        """Return the results of the tests as text for a terminal."""
        facts = [f"{name:<15}{value}" for name, value in self._facts().items()]
        faults = output.table(FAULT_COLUMNS, self._faults())
        seeds = f"{output.count(self.tally.seeds, 'seed')} from {self.first}, weather {self.weather}"
        headline = f"{seeds}, in {output.span(self.wall_s)}, {self.processes} at a time"
        lines = [headline, *facts, "", faults, "", self._verdict()]
        for failure in self.failures:
            lines += ["", f"Seed {failure.seed}: {output.clean(failure.text)}"]
            lines += [f"  {line}" for line in self._explain(failure)]
        return "\n".join(lines)

    def _facts(self) -> Mapping[str, str]:
        tally = self.tally
        ended = sorted(tally.states.items())
        return {
            "jobs": ", ".join(f"{times:,} {state}" for state, times in ended) or "none",
            "tasks": f"{tally.tasks:,}",
            "task starts": f"{tally.starts:,}",
            "managers": f"{tally.managers:,}",
            "virtual time": f"{tally.virtual_ms / 3_600_000:,.1f} h",
            "faults": f"{tally.times.total():,}",
        }

    def _faults(self) -> Iterator[tuple[str, str, str, str]]:
        times, worlds = self.tally.times, self.tally.worlds
        for kind in FaultKind:
            yield kind.value, f"{times[kind]:,}", f"{worlds[kind]:,}", kind.meaning

    def _verdict(self) -> str:
        failed = len(self.failures)
        verdict = f"{output.count(failed, 'seed')} broke a promise." if failed else "Every promise was kept."
        cut = f" {self.cut} {self.wanted - self.tally.seeds:,} seeds were not tried."
        return verdict + (cut if self.cut else "")

    def _explain(self, failure: Failure) -> Iterator[str]:
        happened = output.count(len(failure.faults), "fault")
        shrunk = self.fewest.get(failure.seed)
        if failure.seed not in self.fewest:
            yield f"after {happened}"
        elif shrunk is None:
            yield f"after {happened}; a replay with only these faults does not break the promise"
        elif not shrunk.least and len(shrunk.parts) == len(failure.faults):
            yield f"after {happened}; no smaller set that breaks the promise was found in time"
        else:
            least = "the fewest" if shrunk.least else "the fewest found in time"
            faults = write(shrunk.parts).replace(",", ", ")
            yield f"after {happened}, of which {least} that break the promise are: {faults}"
        yield self.replay(failure)

    def markdown(self) -> str:
        """Return the results of the tests as Markdown, with two tables and the verdict."""
        facts = {
            "seeds": f"{self.tally.seeds:,}, from {self.first}",
            "weather": self.weather,
            **self._facts(),
            "wall time": f"{output.span(self.wall_s)}, {self.processes} at a time",
            "version": __version__,
            "broken promises": f"{len(self.failures):,}",
        }
        lines = ["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in facts.items()), ""]
        lines += [f"| {' | '.join(FAULT_COLUMNS)} |", "| --- | ---: | ---: | --- |"]
        lines += [f"| `{kind}` | {' | '.join(rest)} |" for kind, *rest in self._faults()]
        lines += ["", self._verdict()]
        for failure in self.failures:
            lines += ["", f"- seed {failure.seed}: {output.clean(failure.text)}"]
            lines += [f"  `{self.replay(failure)}`"]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "from": self.first,
            "wanted": self.wanted,
            "seeds": tally.seeds,
            "cut": self.cut,
            "weather": self.weather,
            "jobs": dict(sorted(tally.states.items())),
            "tasks": tally.tasks,
            "starts": tally.starts,
            "managers": tally.managers,
            "virtual_s": tally.virtual_ms / 1000,
            "wall_s": round(self.wall_s, 3),
            "faults": {kind.value: {"times": tally.times[kind], "seeds": tally.worlds[kind]} for kind in FaultKind},
            "failures": [self._failure(failure) for failure in self.failures],
        }

    def _failure(self, failure: Failure) -> dict[str, Any]:
        shrunk = self.fewest.get(failure.seed)
        return {
            **output.attributes(failure, "seed", "promise", "text"),
            "faults": _list(failure.faults),
            "fewest": _list(shrunk.parts) if shrunk else None,
            "least": shrunk.least if shrunk else None,
            "replay": self.replay(failure),
        }


def _list(faults: Sequence[Fault]) -> list[str]:
    return [] if not faults else write(faults).split(",")
