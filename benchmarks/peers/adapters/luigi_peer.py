"""Luigi with its local scheduler: a target file for each task, which Luigi writes to a temporary name and renames.

Each job is one `luigi.build`, which forks one process for each task. A task with a target file is complete.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import luigi

from benchmarks.peers import tasks
from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, ignore
from benchmarks.peers.workloads import Lost


class CallTask(luigi.Task):
    """One call, whose result is a JSON file."""

    target = luigi.Parameter()
    task = luigi.Parameter(significant=False)
    arguments = luigi.Parameter(significant=False)

    def output(self) -> luigi.LocalTarget:
        return luigi.LocalTarget(self.target)

    def run(self) -> None:
        result = tasks.call(self.task, json.loads(self.arguments))
        with self.output().open("w") as file:
            json.dump(result, file)


class Adapter(BaseAdapter):
    """Adapter of Luigi, whose processes end with each job."""

    def start(self) -> None:
        logging.getLogger("luigi").setLevel(logging.CRITICAL)
        settings = luigi.configuration.get_config()
        settings.set("core", "no_configure_logging", "true")
        # By default, an idle Luigi waits for a second, and does not repeat a failed task for 15 minutes.
        settings.set("worker", "wait_interval", "0.01")
        settings.set("worker", "wait_jitter", "0.01")
        settings.set("worker", "keep_alive", "true")
        settings.set("worker", "count_uniques", "false")
        settings.set("scheduler", "retry_delay", "1")
        settings.set("scheduler", "retry_count", "5")

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        folder = self.config.folder / "targets" / secrets.token_hex(4)
        targets = [folder / f"{number:06}.json" for number in range(len(calls))]
        jobs = [
            CallTask(target=str(target), task=task, arguments=json.dumps(list(arguments)))
            for target, arguments in zip(targets, calls, strict=True)
        ]
        luigi.build(jobs, workers=self.config.workers, local_scheduler=True, no_lock=True)
        on_first()
        return [self._read(target) for target in targets]

    def _read(self, target: Path) -> Any:
        return json.loads(target.read_text()) if target.exists() else Lost("no target file")

    def stop(self) -> None:
        """Do nothing, because Luigi ends with its job."""
