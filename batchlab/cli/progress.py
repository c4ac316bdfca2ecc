"""Progress of jobs, replays, deployments, and counted work on stderr.

On a terminal, a thread of the package rich draws a live display. Without a terminal, plain lines are printed every few
seconds, and rich is not imported.
"""

from __future__ import annotations

import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from batchlab.cli import output
from batchlab.core.api_types import GridView, JobView, StageView

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from batchlab.deploy.stack_records import Event
    from batchlab.scenarios.replay.run_state import ReplayProgress

LINE_EVERY_S = 3.0
BAR_UPDATE_S = 0.1
RATE_WINDOW_S = 10.0
LATE_S = 0.5
"""Delay in seconds above which the submission of a job is reported as late."""
SHOWN_RESOURCES = 8
_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "yellow", "PAUSED": "yellow"}


class Display:
    """Context manager that shows progress as a live display on a terminal, or as lines without a terminal."""

    refreshes_per_s = 8

    def __init__(self, *, is_live: bool | None = None, every_s: float = LINE_EVERY_S) -> None:
        self._is_live = sys.stderr.isatty() if is_live is None else is_live
        self._every_s = every_s
        self._started_s = time.monotonic()
        self._line_s = float("-inf")
        self._live: Live | None = None

    @abstractmethod
    def draw(self) -> RenderableType:
        """Return the current progress for the live display."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def say(self, text: str) -> None:
        """Print a permanent line. On a terminal, the line appears above the live display."""
        if self._live:
            self._live.console.print(output.visible(text), markup=False, highlight=False)
        else:
            output.say(text)

    def say_at(self, at_s: float, text: str) -> None:
        """Print a line that begins with the time `at_s`."""
        self._line_s = time.monotonic()
        output.say(f"[{output.span(at_s):>7}] {text}")

    def is_line_due(self) -> bool:
        """Return whether at least `every_s` seconds have passed since the last line of `say_at`."""
        return time.monotonic() - self._line_s >= self._every_s

    def __enter__(self) -> Self:
        if self._is_live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True), get_renderable=self.draw, refresh_per_second=self.refreshes_per_s
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._live = None


@contextmanager
def bar(every_s: float = LINE_EVERY_S) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function that shows the progress of counted work.

    The arguments of the yielded function are the number of finished units, the number of all units, and a text. On a
    terminal, the yielded function shows a progress bar. Without a terminal, the yielded function prints the text at
    most every `every_s` seconds.
    """
    if not sys.stderr.isatty():
        sometimes = output.ThrottledNotes(every_s)
        yield lambda _done, _total, text: sometimes.say(text)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        updated_s = float("-inf")

        def show(done: int, total: int, text: str) -> None:
            nonlocal updated_s
            if time.monotonic() - updated_s >= BAR_UPDATE_S:
                updated_s = time.monotonic()
                progress.update(task, completed=done, total=total, description=text)

        yield show


# --- Jobs ----------------------------------------------------------------------------------------


def count_ended(stage: StageView) -> int:
    """Return the number of a stage's tasks that succeeded, failed, or were canceled."""
    return stage["succeeded"] + stage["failed"] + stage["cancelled"]


def capacity(grid: GridView | None, job: JobView) -> tuple[int, int, int]:
    """Return the number of instances in service, the desired capacity, and the number of slots in service of the job's
    pools.
    """
    names = {stage["pool"] for stage in job["stages"]}
    serving = desired = slots = 0
    for pool in grid["pools"] if grid else ():
        if pool["name"] in names:
            in_service = sum(one["state"] == "InService" for one in pool["instances"])
            serving += in_service
            desired += pool["desired"]
            slots += in_service * pool["slots"]
    return serving, desired, slots


@dataclass(slots=True)
class Rates:
    """Tasks per second of each stage over the last RATE_WINDOW_S seconds."""

    samples: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    def note(self, job: JobView, now_s: float) -> None:
        for stage in job["stages"]:
            samples = self.samples.setdefault(stage["name"], deque())
            if not count_ended(stage):
                samples.clear()  # The rate excludes the time in which no task of the stage has ended yet.
            samples.append((now_s, count_ended(stage)))
            while len(samples) > 2 and samples[1][0] < now_s - RATE_WINDOW_S:
                samples.popleft()

    def of(self, stage: StageView) -> float | None:
        """Return the rate of a stage in tasks per second, or None if no task ended within the time window."""
        samples = self.samples.get(stage["name"])
        if not samples or samples[-1][1] == samples[0][1]:
            return None
        return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])

    def left_s(self, stage: StageView) -> float | None:
        """Return the seconds until the end of the stage at its current rate, or None if the rate is unknown."""
        rate = self.of(stage)
        if rate is None or stage["planned"] is None:
            return None
        return (stage["planned"] - count_ended(stage)) / rate


class JobDisplay(Display):
    """Progress of a job, with one line and a bar for each stage, and a line for the workers.

    Without a terminal, lines are printed when the job's state changes, when a stage ends, and every few seconds.
    """

    def __init__(self, *, is_live: bool | None = None, every_s: float = LINE_EVERY_S) -> None:
        super().__init__(is_live=is_live, every_s=every_s)
        self._rates = Rates()
        self._views: tuple[JobView, GridView | None] | None = None
        self._progress: tuple[object, ...] = ()
        self._text = ""
        self._cost = ""

    def cost(self, text: str) -> None:
        """Set the text about the job's cost that the display shows from its next update on."""
        self._cost = f"it {text}" if text else ""

    def show(self, job: JobView, grid: GridView | None) -> None:
        self._rates.note(job, time.monotonic())
        self._views = (job, grid)
        if not self._is_live:
            self._print(job, grid)

    def _print(self, job: JobView, grid: GridView | None) -> None:
        progress = (job["state"], [stage["planned"] == count_ended(stage) for stage in job["stages"]])
        text = f"{job['id']} {job['state']}: {', '.join(map(_stage_text, job['stages']))}"
        if progress == self._progress and (not self.is_line_due() or text == self._text):
            return
        self._progress, self._text = progress, text
        serving, desired, _ = capacity(grid, job)
        parts = [text, f"{serving}/{desired} workers" if grid else "", self._cost]
        self.say_at(self.elapsed_s, "; ".join(filter(None, parts)))

    def draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._views is None:
            return Text("waiting for the grid")
        job, grid = self._views
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "right", "right", "right", "right", "left"):
            table.add_column(justify=justify, no_wrap=True)
        for stage in job["stages"]:
            planned, done = stage["planned"], count_ended(stage)
            rate, left_s = self._rates.of(stage), self._rates.left_s(stage)
            table.add_row(
                Text(output.clean(stage["name"])),
                ProgressBar(total=max(planned or 1, 1), completed=done, width=24, finished_style="green"),
                f"{done:,}/{'?' if planned is None else format(planned, ',')}",
                Text(f"{stage['failed']} failed", "red") if stage["failed"] else "",
                f"{stage['running']} running" if stage["running"] else "",
                f"{rate:,.1f}/s" if rate else "",
                f"{output.span(left_s)} left" if left_s else "",
            )
        serving, desired, _ = capacity(grid, job)
        state = Text(job["state"], _STYLES.get(job["state"], "cyan"))
        workers = f"  {serving}/{desired} workers  {output.span(self.elapsed_s)}"
        cost = f"  {self._cost}" if self._cost else ""
        return Group(table, Text.assemble(job["id"], " ", state, f"{workers}{cost}"))


def _stage_text(stage: StageView) -> str:
    planned = "?" if stage["planned"] is None else stage["planned"]
    failed = f" ({stage['failed']} failed)" if stage["failed"] else ""
    return f"{stage['name']} {count_ended(stage)}/{planned}{failed}"


# --- Replays of scenarios ------------------------------------------------------------------------


class ReplayDisplay(Display):
    """Progress of a replay, with a bar for the jobs, and lines for the queues, the fleet, and the faults.

    Without a terminal, lines are printed when a fault begins or ends, and every few seconds.
    """

    refreshes_per_s = 4

    def __init__(self, *, is_live: bool | None = None, every_s: float = LINE_EVERY_S) -> None:
        super().__init__(is_live=is_live, every_s=every_s)
        self._state: ReplayProgress | None = None
        self._faults: tuple[str, ...] = ()

    def show(self, state: ReplayProgress) -> None:
        self._state = state
        if self._is_live or (state.doing == self._faults and not self.is_line_due()):
            return
        self._faults = state.doing
        parts = [_jobs_text(state), _grid_text(state), *_notes(state)]
        self.say_at(state.at_s, "; ".join(filter(None, parts)))

    def draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self._state
        if state is None:
            return Text("preparing the first jobs")
        head = Table.grid(padding=(0, 2))
        jobs = ProgressBar(total=max(1, state.jobs), completed=state.ended, width=32, finished_style="green")
        head.add_row(output.span(state.at_s), jobs, _jobs_text(state))
        below = [_grid_text(state), *_notes(state)]
        return Group(head, *(Text(line, "red" if "broken" in line else "") for line in below))


def _jobs_text(state: ReplayProgress) -> str:
    bad = f", {state.bad} of them badly" if state.bad else ""
    return f"{state.ended:,}/{state.jobs:,} jobs ended{bad}, {state.submitted:,} submitted"


def _grid_text(state: ReplayProgress) -> str:
    if state.sample is None:
        return ""
    pools = state.sample.pools.values()
    in_service = sum(pool.in_service for pool in pools)
    desired = sum(pool.desired for pool in pools)
    waiting, in_flight = state.sample.waiting, state.sample.in_flight
    return f"{output.count(waiting, 'message')} waiting, {in_flight:,} in flight; {in_service}/{desired} instances"


def _notes(state: ReplayProgress) -> list[str]:
    notes = []
    if state.left_s >= 1 and state.ended < state.jobs:
        notes.append(f"about {output.span(state.left_s)} left")
    if state.late_s > LATE_S:
        notes.append(f"submissions up to {output.span(state.late_s)} late")
    if state.doing:
        notes.append(f"broken now: {', '.join(state.doing)}")
    return notes


# --- Operations on a stack -----------------------------------------------------------------------


class StackDisplay(Display):
    """Progress of a stack operation, with a bar, the resources in progress, and permanent lines for failures.

    Without a terminal, a line is printed for each event about the end or the failure of a resource.
    """

    def __init__(self, operation: str, total: int, *, is_live: bool | None = None) -> None:
        super().__init__(is_live=is_live)
        self._operation = operation
        self._total = total
        self._current: dict[str, str] = {}
        self._ended: set[str] = set()

    def show_event(self, event: Event) -> None:
        """Show a CloudFormation event of the stack in the display."""
        is_in_progress = event.status.endswith("_IN_PROGRESS")
        if not self._is_live:
            if event.is_of_stack or not is_in_progress:
                self.say_at(self.elapsed_s, _event_text(event))
        elif event.is_of_stack:
            self.say(_event_text(event))
        elif is_in_progress:
            self._current[event.resource] = event.status
        else:
            self._current.pop(event.resource, None)
            self._ended.add(event.resource)
            if event.has_failed:
                self.say(_event_text(event))

    def draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        done = len(self._ended)
        # CloudFormation may also send events of unchanged resources, so more resources than planned may end.
        total = max(self._total, done)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self._operation),
            ProgressBar(total=max(total, 1), completed=done, width=24),
            f"{done}/{total}" if self._total else str(done),
            output.span(self.elapsed_s),
        )
        current = list(self._current.items())[:SHOWN_RESOURCES]
        return Group(head, *(Text(f"  {status.lower()} {name}", "dim") for name, status in current))


def _event_text(event: Event) -> str:
    reason = f": {event.reason}" if event.reason else ""
    return output.clean(f"{event.status} {event.resource} ({event.type}){reason}")
