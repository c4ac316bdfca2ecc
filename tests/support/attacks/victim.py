"""The job that the tests attack. Each task of the job waits for a gate, and records its start."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from batchlab.core.model import Bundle, JobId, StageName, TaskSet
from batchlab.core.protocol import object_keys
from tests.support.grid.local_grid import LocalGrid

STAGE = StageName("triple")

WORK = """\
import os, time

def triple(item):
    with open({starts!r}, "a") as file:
        file.write(f"{{item}}\\n")
    deadline_s = time.monotonic() + 30
    while not os.path.exists({gate!r}):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return item * 3
"""

JOB = """\
name: {name}
input: {{files: items.jsonl, split: items}}
stages:
  - {{name: triple, python: work:triple, bundle: 1}}
"""


def messages_left(grid: LocalGrid) -> int:
    """Return the number of messages that wait for workers of the default pool or are in flight."""

    async def counted() -> int:
        queue = grid.backend.open_queue(grid.home, grid.backend.open_clock())
        try:
            depth = await queue.depth(object_keys.tasks_queue("default"))
        finally:
            await queue.close()
        return depth.visible + depth.in_flight + depth.delayed

    return asyncio.run(counted())


@dataclass
class Victim:
    """A job of `tasks` tasks on a real grid, with one bundle per task."""

    grid: LocalGrid
    folder: Path
    tasks: int = 3
    id: JobId = field(init=False)

    def submit(self, name: str = "victim", token: str = "t") -> JobId:
        """Submit the job; its tasks wait until `open_gate`."""
        self.folder.mkdir()
        work = WORK.format(starts=str(self.starts), gate=str(self.gate))
        (self.folder / "work.py").write_text(work)
        (self.folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(self.tasks)))
        path = self.folder / "job.yaml"
        path.write_text(JOB.format(name=name))
        self.starts.touch()
        self.id = JobId(self.grid.submit(path, token)["id"])
        return self.id

    @property
    def starts(self) -> Path:
        return self.folder / "starts"

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    def open_gate(self) -> None:
        """Let the waiting tasks end."""
        self.gate.touch()

    def bundle(self, task: int) -> Bundle:
        return Bundle(self.id, STAGE, TaskSet.from_indices([task]))

    def started(self) -> list[int]:
        """Return the index of a task for each of its starts."""
        return sorted(int(line) for line in self.starts.read_text().split())

    def check(self, out: Path) -> None:
        """Check that the job succeeded with its own results, and that each task ran once."""
        view = self.grid.wait(self.id)
        assert view["state"] == "SUCCEEDED"
        assert self.grid.results(view, out)["triple"] == [3 * i for i in range(self.tasks)]
        (stage,) = view["stages"]
        assert (stage["succeeded"], stage["failed"]) == (self.tasks, 0)
        assert self.started() == list(range(self.tasks))
