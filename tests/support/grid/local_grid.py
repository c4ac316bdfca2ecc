"""A grid of real processes for tests, on any backend."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from batchlab.adapters.local.processes import living
from batchlab.client.http import Client
from batchlab.core.api_types import JobView
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import table
from batchlab.core.ports import Objects
from batchlab.core.protocol import object_keys
from batchlab.jobs import results, submission
from batchlab.jobs.job_file import load
from batchlab.jobs.results import Listed
from batchlab.runtime import factory, manager_process
from batchlab.runtime.home import Home
from tests.support.processes import command_line

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")


class LocalGrid:
    """A grid in `folder`. `stop` ends the grid."""

    def __init__(
        self, folder: Path, pools: Sequence[Pool] = (), *, backend: str = "local", endpoint: str | None = None
    ) -> None:
        self.home = Home(folder)
        self.backend = factory.load(backend, endpoint)
        self.pools = pools
        self.start()

    @cached_property
    def objects(self) -> Objects:
        """Return the grid's bucket."""
        return self.backend.open_objects(self.home)

    def start(self) -> None:
        """Start a manager, and connect the client to it."""
        record = manager_process.start_manager(self.home, self.backend, pools=self.pools, parent=True)
        self.client = Client.of(self.home, record)

    def stop(self) -> None:
        self.client.close()
        manager_process.stop_manager(self.home)

    def submit(self, path: Path, token: str = "t", **params: str) -> JobView:
        return self.client.submit(self.prepared(path, token, **params))

    def prepared(self, path: Path, token: str = "t", **params: str) -> JobDef:
        """Load a job file, upload its data to the bucket, and return the job definition."""
        return asyncio.run(
            submission.prepare(
                load(path, params),
                objects=self.objects,
                clock=self.backend.open_clock(),
                patience=factory.patience(),
                token=token,
            )
        )

    def wait(
        self, job: str, *, until: Callable[[JobView], bool] = lambda v: v["state"] in ENDED, within_s: float = 60.0
    ) -> JobView:
        """Return the job's view once `until` returns true. Fail after `within_s`."""
        deadline_s = time.monotonic() + within_s
        view = self.client.job(job)
        while not until(view):
            assert time.monotonic() < deadline_s, (view, self.client.why(job))
            view = self.client.job(job, version=view["version"], wait_s=1.0)
        return view

    def run(self, path: Path, **params: str) -> JobView:
        return self.wait(self.submit(path, **params)["id"])

    def results(self, view: JobView, out: Path) -> dict[str, list[Any]]:
        """Return the values of the final stages in task order, as a user would fetch them."""
        listing: list[Listed] = []
        after = None
        while True:
            page = self.client.outcomes(view["id"], after=after)
            if not page["outcomes"]:
                break
            listing += [Listed.from_view(one) for one in page["outcomes"]]
            after = page["outcomes"][-1]["seq"]
        fetched = asyncio.run(results.fetch(self.objects, view, listing, out, patience=factory.patience()))
        return {
            stage: [json.loads(line)["value"] for line in (out / f"{stage}.jsonl").read_text().splitlines()]
            for stage in fetched.results
        }

    # --- Faults ----------------------------------------------------------------------------------

    def kill_manager(self) -> None:
        """Kill the manager with SIGKILL, and start the next one."""
        record = self.home.record()
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 5
        while self.home.record() is not None:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        self.client.close()
        os.waitpid(record.pid, 0)
        self.start()

    def purge(self) -> None:
        """Drop every waiting or in-flight message of the default pool's task queue."""

        async def drop() -> None:
            queue = self.backend.open_queue(self.home, self.backend.open_clock())
            try:
                await queue.purge(object_keys.tasks_queue("default"))
            finally:
                await queue.close()

        asyncio.run(drop())

    def workers(self) -> Mapping[str, int]:
        """Return the pid of each living worker process, by instance."""
        return living(self.home.fleet)

    def emulator(self) -> int:
        """Return the pid of the grid's own emulator."""
        (pid,) = [
            pid
            for pid, words in processes_of(self.home.path).items()
            if any("ministack_guard" in word for word in words)
        ]
        return pid

    def kill_worker(self, *, within_s: float = 20.0) -> str:
        """Kill one worker with SIGKILL, and return its instance."""
        deadline_s = time.monotonic() + within_s
        while not self.workers():
            assert time.monotonic() < deadline_s, "no worker came up"
            time.sleep(0.02)
        instance, pid = next(iter(self.workers().items()))
        os.kill(pid, signal.SIGKILL)
        return instance


def processes_of(home: Path) -> dict[int, list[str]]:
    """Return the command lines of the living processes of the grid in `home`, by pid: the manager, the workers, and the
    emulator."""
    emulators = f"{home}/ministack/"
    found = {}
    for process in table():
        words = command_line(process.pid)  # empty for a zombie
        if any(word == str(home) or word.startswith(emulators) for word in words):
            found[process.pid] = words
    return found


def outcomes(grid: LocalGrid, job: str) -> list[dict[str, Any]]:
    """Return the document of every committed outcome of a job."""

    async def read() -> list[dict[str, Any]]:
        keys = [one.key async for page in grid.objects.list(f"jobs/{job}/") for one in page]
        found = [key for key in keys if key.split("/")[3:4] == ["outcomes"]]
        return [json.loads(await grid.objects.get(key)) for key in sorted(found)]

    return asyncio.run(read())
