"""Simulated tasks of known durations that all succeed: what a forecast needs, and nothing else.

Invariant: tasks begin and end when they would one by one. Only short ones are waited for together,
so that ten million of them cost no ten million timers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from batchlab.model import Ran
from batchlab.ports import Clock
from batchlab.sim.pauses import Pause
from batchlab.worker.runner import Handle, Work

TOGETHER_S = 0.05

LOOKS = 20
"""How often a long task looks whether it is to be killed."""

Durations = Callable[[Work], Sequence[float]]
"""Seconds that each task of a bundle takes."""


class TimedRunner:
    """A Runner whose tasks take the time that they are said to take.

    Tasks are waited for together as long as they take no more than `together_s`: so late a run
    notices that it is to stop. `look_s` is how soon it notices that it is to be killed, where a
    twentieth of its longest task is not later still.
    """

    def __init__(
        self,
        durations: Durations,
        clock: Clock,
        *,
        together_s: float = TOGETHER_S,
        look_s: float = 0.0,
    ) -> None:
        self._durations = durations
        self._clock = clock
        self._together_s = together_s
        self._look_s = max(together_s, look_s)
        self._pause = Pause()

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        """See worker.runner."""
        tasks = list(work.bundle.tasks)
        durations = self._durations(work)
        begun_s = self._clock.monotonic_s()
        # Tasks are told of together too, at last before a long one: of thousands of bundles that
        # run side by side, none then keeps what its tasks came to.
        told = 0
        for first, takes_s in self._groups(durations):
            now_s = self._clock.monotonic_s()
            spent = work.budget_s is not None and first and now_s - begun_s >= work.budget_s
            if spent or handle.stop or now_s >= handle.until_s:
                break
            if takes_s > self._together_s:
                for n in range(told, first):
                    yield Ran(tasks[n], durations[n])
                told = first
            handle.running = tasks[first]
            if not await self._last(takes_s, handle):
                break
            handle.running = None
        else:
            first = len(tasks)
        for n in range(told, first):
            yield Ran(tasks[n], durations[n])

    async def close(self) -> None:
        """Nothing to end."""

    def _groups(self, durations: Sequence[float]) -> Iterator[tuple[int, float]]:
        """(first task, seconds) of what is waited for together."""
        first, takes_s = 0, 0.0
        for n, run_s in enumerate(durations):
            if n > first and takes_s + run_s > self._together_s:
                yield first, takes_s
                first, takes_s = n, 0.0
            takes_s += run_s
        yield first, takes_s

    async def _last(self, takes_s: float, handle: Handle) -> bool:
        """Let time pass; False where what runs was killed meanwhile."""
        end_s = self._clock.monotonic_s() + takes_s
        look_s = max(self._look_s, takes_s / LOOKS)
        while (left_s := end_s - self._clock.monotonic_s()) > 0:
            await self._pause(min(left_s, look_s))
            if handle.kill:
                return False
        return not handle.kill
