"""A run as far as it has come: what was submitted, what became of it, what was broken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from batchlab.model import ENDED
from batchlab.replay.measuring import Told
from batchlab.scenario.model import Job, Scenario
from batchlab.scenario.record import Injected, Sample
from batchlab.views import JobView

OVER = "the run was over before"
"""Why a fault was not injected."""


@dataclass(frozen=True, slots=True)
class State:
    """How far a replay is, for whoever watches. Jobs; `bad` are those that have ended otherwise
    than well. `late_s` is the longest delay of a submission, `left_s` a guess at what is left,
    `doing` says what is being broken now."""

    at_s: float
    jobs: int
    submitted: int
    ended: int
    bad: int
    late_s: float
    left_s: float
    sample: Sample | None
    doing: tuple[str, ...] = ()


@dataclass(slots=True)
class Running:
    """A job that was submitted `at_s` seconds after the run's beginning."""

    due: Job
    at_s: float
    view: JobView

    @property
    def has_ended(self) -> bool:
        return self.view["state"] in ENDED


@dataclass(slots=True)
class Course:
    """`begun_s` is the run's beginning (epoch), `begun_at_s` the same by the event loop's clock;
    `running` has the jobs by the grid's id; `cut` says why it ended before they had."""

    scenario: Scenario
    seed: int
    jobs: Sequence[Job]
    begun_s: float = 0.0
    begun_at_s: float = 0.0
    running: dict[str, Running] = field(default_factory=dict)
    injected: list[Injected] = field(default_factory=list)
    breaking: list[str] = field(default_factory=list)
    cut: str = ""
    took_s: float = 0.0

    def begin(self, now_s: float) -> None:
        """The run begins now, which is `now_s` by the calendar."""
        self.begun_s, self.begun_at_s = now_s, asyncio.get_running_loop().time()

    def at_s(self) -> float:
        """Seconds of the run."""
        return asyncio.get_running_loop().time() - self.begun_at_s

    async def until(self, at_s: float) -> None:
        """Wait for that second of the run."""
        await asyncio.sleep(max(0.0, at_s - self.at_s()))

    @property
    def open(self) -> list[str]:
        """Jobs that were submitted and have not ended."""
        return [name for name, one in self.running.items() if not one.has_ended]

    @property
    def is_over(self) -> bool:
        """Whether every job has ended."""
        return len(self.running) == len(self.jobs) and not self.open

    def told(self) -> list[Told]:
        return [Told(one.due.template.name, one.view, one.due) for one in self.running.values()]

    def state(self, sample: Sample | None) -> State:
        """How far it is."""
        ended = [one for one in self.running.values() if one.has_ended]
        return State(
            self.at_s(),
            len(self.jobs),
            len(self.running),
            len(ended),
            sum(one.view["state"] != "SUCCEEDED" for one in ended),
            max((one.at_s - one.due.due_s for one in self.running.values()), default=0.0),
            self._left_s(sample),
            sample,
            tuple(self.breaking),
        )

    def _left_s(self, sample: Sample | None) -> float:
        """Until the last job arrives, or as long as the backlog takes whoever is there now."""
        arrivals_s = self.jobs[-1].due_s - self.at_s() if self.jobs else 0.0
        slots = {plan.pool.name: plan.pool.slots for plan in self.scenario.pools}
        works_s = (
            pool.backlog_s / (max(1, pool.in_service, pool.desired) * slots.get(name, 1))
            for name, pool in (sample.pools.items() if sample else ())
        )
        return max(0.0, arrivals_s, *works_s)
