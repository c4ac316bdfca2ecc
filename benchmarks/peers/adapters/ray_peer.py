"""Ray: tasks of Ray Core on a local node, without the dashboard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray

from benchmarks.peers import tasks
from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, collect, ignore

RETRIES = 3


class Adapter(BaseAdapter):
    """Adapter of Ray. The raylet lives with the driver, so a node is a worker process."""

    def start(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            num_cpus=self.config.workers,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 * 2**20,
            logging_level="ERROR",
        )
        self._call = ray.remote(max_retries=RETRIES)(tasks.call)

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        references = [self._call.remote(task, arguments) for arguments in calls]
        if on_first is not ignore:
            ray.get(references[0])
            on_first()
        try:
            return list(ray.get(references, timeout=timeout_s))
        except ray.exceptions.RayError:
            return collect(references, lambda one, _: ray.get(one, timeout=1), timeout_s, ignore)

    def stop(self) -> None:
        ray.shutdown()
