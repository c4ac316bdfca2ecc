"""A replay as it runs: a picture that moves in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, Self

from batchlab.cli import output
from batchlab.cli.progress import PLAIN_EVERY_S, Moving

if TYPE_CHECKING:
    from rich.console import RenderableType

    from batchlab.scenarios.replay.run_state import ReplayProgress

LATE_S = 0.5
"""A submission that is later than this is told of."""


class Progress(Protocol):
    """Shows a replay; a context manager that cleans up the terminal."""

    def show(self, state: ReplayProgress) -> None:
        """Time has passed."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def follow() -> Progress:
    """The picture where stderr is a terminal, else lines."""
    return Picture() if sys.stderr.isatty() else Lines()


def jobs_text(state: ReplayProgress) -> str:
    """`12/40 jobs ended, 1 of them badly, 20 submitted`."""
    bad = f", {state.bad} of them badly" if state.bad else ""
    return f"{state.ended:,}/{state.jobs:,} jobs ended{bad}, {state.submitted:,} submitted"


def grid_text(state: ReplayProgress) -> str:
    """`30 messages waiting, 4 in flight; 2/4 instances`; empty before anything was seen."""
    if state.sample is None:
        return ""
    pools = state.sample.pools.values()
    up, desired = (sum(getattr(p, name) for p in pools) for name in ("in_service", "desired"))
    waiting, busy = state.sample.waiting, state.sample.in_flight
    return f"{waiting:,} messages waiting, {busy:,} in flight; {up}/{desired} instances"


def notes(state: ReplayProgress) -> list[str]:
    """What else there is to say."""
    found = []
    if state.left_s >= 1 and state.ended < state.jobs:
        found.append(f"about {output.span(state.left_s)} left")
    if state.late_s > LATE_S:
        found.append(f"submissions up to {output.span(state.late_s)} late")
    if state.doing:
        found.append(f"broken now: {', '.join(state.doing)}")
    return found


class Lines:
    """A line every few seconds, and when something begins or ends to be broken."""

    def __init__(self, every_s: float = PLAIN_EVERY_S) -> None:
        self._every_s = every_s
        self._said_s = float("-inf")
        self._doing: tuple[str, ...] = ()

    def show(self, state: ReplayProgress) -> None:
        now_s = time.monotonic()
        if state.doing == self._doing and now_s - self._said_s < self._every_s:
            return
        self._said_s, self._doing = now_s, state.doing
        told = [jobs_text(state), grid_text(state), *notes(state)]
        output.say(f"[{output.span(state.at_s):>7}] {'; '.join(filter(None, told))}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


class Picture(Moving):
    """A bar of the jobs, and below it queues and fleet."""

    per_second = 4

    def __init__(self) -> None:
        self._state: ReplayProgress | None = None

    def show(self, state: ReplayProgress) -> None:
        self._state = state

    def draw(self) -> RenderableType:
        """What there is to see now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self._state
        if state is None:
            return Text("preparing the first jobs")
        bars = Table.grid(padding=(0, 2))
        bar = ProgressBar(
            total=max(1, state.jobs), completed=state.ended, width=32, finished_style="green"
        )
        bars.add_row(output.span(state.at_s), bar, jobs_text(state))
        below = [grid_text(state), *notes(state)]
        return Group(bars, *(Text(line, "red" if "broken" in line else "") for line in below))
