"""What a campaign over seeds came to: for a person, for a program, and as Markdown for the docs.

Invariant: every kind of fault is in the table, also one that never happened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchlab import __version__
from batchlab.cli import output
from batchlab.sim.faults import Fault, FaultKind
from batchlab.sim.fuzz import Failure, Tally, command, written
from batchlab.sim.shrink import Shrunk

FAULT_COLUMNS = ("fault", "times", "in seeds", "meaning")


@dataclass(slots=True)
class Campaign:
    """Seeds `first` and following, and what is known of them."""

    first: int
    wanted: int
    weather: str
    processes: int
    tally: Tally = field(default_factory=Tally)
    fewest: dict[int, Shrunk[Fault] | None] = field(default_factory=dict)
    """By failed seed, for those that were shrunk."""
    wall_s: float = 0.0
    cut: str = ""
    """Why it ended before the last seed."""

    @property
    def failures(self) -> Sequence[Failure]:
        return self.tally.failures

    def replay(self, failure: Failure) -> str:
        """The one command that shows a failure again, by the fewest faults known."""
        found = self.fewest.get(failure.seed)
        return command(failure, self.weather, found.parts if found else None)

    # --- For a person ----------------------------------------------------------------------------

    def text(self) -> str:
        """All of it."""
        facts = [f"{name:<15}{value}" for name, value in self._facts().items()]
        faults = output.table(FAULT_COLUMNS, self._faults())
        told = [self._headline(), *facts, "", faults, "", self._verdict()]
        for failure in self.failures:
            told += ["", f"Seed {failure.seed}: {output.clean(failure.text)}"]
            told += [f"  {line}" for line in self._of(failure)]
        return "\n".join(told)

    def _headline(self) -> str:
        tried = output.count(self.tally.seeds, "seed")
        return (
            f"{tried} from {self.first}, weather {self.weather}, in {output.span(self.wall_s)}, "
            f"{self.processes} at a time"
        )

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
        verdict = (
            f"{output.count(failed, 'seed')} broke a promise."
            if failed
            else "Every promise was kept."
        )
        cut = f" {self.cut} {self.wanted - self.tally.seeds:,} seeds were not tried."
        return verdict + (cut if self.cut else "")

    def _of(self, failure: Failure) -> Iterator[str]:
        happened = output.count(len(failure.faults), "fault")
        found = self.fewest.get(failure.seed)
        if failure.seed not in self.fewest:
            yield f"after {happened}"
        elif found is None:
            yield f"after {happened}; a replay of only these does not break it"
        elif not found.least and len(found.parts) == len(failure.faults):
            yield f"after {happened}; no fewer that break it were found in time"
        else:
            least = "the fewest" if found.least else "the fewest found in time"
            shown = written(found.parts).replace(",", ", ")
            yield f"after {happened}, of which {least} that break it are: {shown}"
        yield self.replay(failure)

    # --- For the docs ----------------------------------------------------------------------------

    def markdown(self) -> str:
        """Two tables and the verdict."""
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

    # --- For a program ---------------------------------------------------------------------------

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
            "faults": {
                kind.value: {"times": tally.times[kind], "seeds": tally.worlds[kind]}
                for kind in FaultKind
            },
            "failures": [self._failure(one) for one in self.failures],
        }

    def _failure(self, failure: Failure) -> dict[str, Any]:
        found = self.fewest.get(failure.seed)
        return {
            "seed": failure.seed,
            "promise": failure.promise,
            "text": failure.text,
            "faults": _list(failure.faults),
            "fewest": _list(found.parts) if found else None,
            "least": found.least if found else None,
            "replay": self.replay(failure),
        }


def _list(faults: Sequence[Fault]) -> list[str]:
    return [] if not faults else written(faults).split(",")
