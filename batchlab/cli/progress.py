"""A job as it runs: a picture that moves in a terminal, a line now and then elsewhere.

Invariant: nothing but plain lines goes where nobody can see a picture.

A picture on stderr that moves. rich's own thread draws it: its clock goes on while we wait.

rich is imported only where there is somebody to see it.
"""

from __future__ import annotations

import sys
import time
from abc import abstractmethod
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from batchlab.cli import output
from batchlab.core.api_types import GridView, JobView, StageView

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class Moving:
    """A context manager: the picture stands while it is entered, and its last state stays."""

    per_second = 8
    _live: Live | None = None

    @abstractmethod
    def draw(self) -> RenderableType:
        """What there is to see now."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            console=Console(stderr=True),
            get_renderable=self.draw,
            refresh_per_second=self.per_second,
        )
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._live = None


PLAIN_EVERY_S = 3.0
RATE_OVER_S = 10.0
_STYLES = {"SUCCEEDED": "green", "FAILED": "red", "CANCELLED": "yellow", "PAUSED": "yellow"}


def ended(stage: StageView) -> int:
    """Tasks of a stage that have a terminal state."""
    return stage["succeeded"] + stage["failed"] + stage["cancelled"]


def capacity(grid: GridView | None, job: JobView) -> tuple[int, int, int]:
    """Instances in service, desired, and slots in service, of the pools the job uses."""
    pools = {stage["pool"] for stage in job["stages"]}
    serving = desired = slots = 0
    for pool in grid["pools"] if grid else ():
        if pool["name"] in pools:
            up = sum(one["state"] == "InService" for one in pool["instances"])
            serving, desired, slots = (
                serving + up,
                desired + pool["desired"],
                slots + up * pool["slots"],
            )
    return serving, desired, slots


@dataclass(slots=True)
class Rates:
    """Tasks per second by stage, over the last few seconds."""

    seen: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    def note(self, job: JobView, now_s: float) -> None:
        for stage in job["stages"]:
            samples = self.seen.setdefault(stage["name"], deque())
            if not ended(stage):
                samples.clear()  # waiting for workers is no slowness of theirs
            samples.append((now_s, ended(stage)))
            while len(samples) > 2 and samples[1][0] < now_s - RATE_OVER_S:
                samples.popleft()

    def of(self, stage: StageView) -> float | None:
        """None where nothing has ended lately."""
        samples = self.seen.get(stage["name"])
        if not samples or samples[-1][1] == samples[0][1]:
            return None
        return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])

    def left_s(self, stage: StageView) -> float | None:
        """Seconds until the stage has ended, at that rate."""
        rate = self.of(stage)
        if rate is None or stage["planned"] is None:
            return None
        return (stage["planned"] - ended(stage)) / rate


class Progress(Protocol):
    """Shows a job; a context manager that cleans up the terminal."""

    def show(self, job: JobView, grid: GridView | None) -> None:
        """The job has changed, or time has passed."""

    def cost(self, text: str) -> None:
        """What it costs, to be shown with what comes next."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None: ...


def follow() -> Progress:
    """The picture where stderr is a terminal, else lines."""
    return Picture() if sys.stderr.isatty() else Lines()


class Lines:
    """A line when the job's state changes, when a stage ends, and every few seconds."""

    def __init__(self, every_s: float = PLAIN_EVERY_S) -> None:
        self._every_s = every_s
        self._begun_s = time.monotonic()
        self._said_s = float("-inf")
        self._said: tuple[object, ...] = ()
        self._text = ""
        self._cost = ""

    def cost(self, text: str) -> None:
        self._cost = f"; it {text}" if text else ""

    def show(self, job: JobView, grid: GridView | None) -> None:
        now_s = time.monotonic()
        notable = (job["state"], [s["planned"] == ended(s) for s in job["stages"]])
        text = f"{job['id']} {job['state']}: {', '.join(map(_stage_text, job['stages']))}"
        if notable == self._said and (now_s - self._said_s < self._every_s or text == self._text):
            return
        self._said, self._said_s, self._text = notable, now_s, text
        serving, desired, _ = capacity(grid, job)
        workers = f"; {serving}/{desired} workers" if grid else ""
        output.say(f"[{output.span(now_s - self._begun_s):>7}] {text}{workers}{self._cost}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


def _stage_text(stage: StageView) -> str:
    planned = "?" if stage["planned"] is None else stage["planned"]
    failed = f" ({stage['failed']} failed)" if stage["failed"] else ""
    return f"{stage['name']} {ended(stage)}/{planned}{failed}"


class Picture(Moving):
    """One line per stage with a bar, and one for the workers."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._rates = Rates()
        self._shown: tuple[JobView, GridView | None] | None = None
        self._cost = ""

    def cost(self, text: str) -> None:
        self._cost = f"  it {text}" if text else ""

    def show(self, job: JobView, grid: GridView | None) -> None:
        self._rates.note(job, time.monotonic())
        self._shown = (job, grid)

    def draw(self) -> RenderableType:
        """What there is to see now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if self._shown is None:
            return Text("waiting for the grid")
        job, grid = self._shown
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "right", "right", "right", "right", "left"):
            table.add_column(justify=justify, no_wrap=True)
        for stage in job["stages"]:
            planned, done = stage["planned"], ended(stage)
            rate, left_s = self._rates.of(stage), self._rates.left_s(stage)
            table.add_row(
                Text(output.clean(stage["name"])),
                ProgressBar(
                    total=max(planned or 1, 1), completed=done, width=24, finished_style="green"
                ),
                f"{done:,}/{'?' if planned is None else format(planned, ',')}",
                Text(f"{stage['failed']} failed", "red") if stage["failed"] else "",
                f"{stage['running']} running" if stage["running"] else "",
                f"{rate:,.1f}/s" if rate else "",
                f"{output.span(left_s)} left" if left_s else "",
            )
        serving, desired, _ = capacity(grid, job)
        state = Text(job["state"], _STYLES.get(job["state"], "cyan"))
        since = output.span(time.monotonic() - self._begun_s)
        foot = Text.assemble(
            job["id"], " ", state, f"  {serving}/{desired} workers  {since}{self._cost}"
        )
        return Group(table, foot)
