"""RQ: one `rq worker` process for each worker. The class Worker forks for each job, and SimpleWorker does not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from redis import Redis
from rq import Queue, Retry
from rq.job import Job

from benchmarks.peers.adapters.base import Call, NodeAdapter, OnFirst, collect, ignore
from benchmarks.peers.tasks import call

_BATCH = 1000


class JobFailed(Exception):
    """A job failed in all its attempts."""


class Adapter(NodeAdapter):
    """Adapter of RQ. With `reliable`, RQ retries jobs, and idle workers search for abandoned jobs every 5 s."""

    one_slot = True

    def start(self) -> None:
        self._name = f"rq-{self.config.run_id}"
        self.start_nodes()
        # By default, redis-py ends a blocking read after 5 s.
        connection = Redis.from_url(self.config.urls["redis"], socket_timeout=None)
        self._queue = Queue(self._name, connection=connection)

    def node(self, number: int, slots: int) -> list[str]:
        arguments = ["-m", "rq.cli", "worker", "--url", self.config.urls["redis"], "--quiet"]
        arguments += ["--results-ttl", "3600", "--worker-class", self.config.options["worker"]]
        if self.config.reliable:
            arguments += ["--job-monitoring-interval", "5", "--maintenance-interval", "5", "--worker-ttl", "20"]
        return [*arguments, self._name]

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        options: dict[str, Any] = {"result_ttl": 3600}
        if self.config.reliable:
            options |= {"retry": Retry(max=3), "timeout": 30}
        jobs: list[Job] = []
        for start in range(0, len(calls), _BATCH):
            batch = calls[start : start + _BATCH]
            jobs += self._queue.enqueue_many([Queue.prepare_data(call, (task, one), **options) for one in batch])
        return collect(jobs, self._result, timeout_s, on_first)

    def _result(self, job: Job, seconds: float) -> Any:
        """Wait for the result of `job`. A stored failure does not end the wait while RQ may retry the job."""
        deadline = time.monotonic() + seconds
        while True:
            result = job.latest_result(timeout=max(1, int(min(5, deadline - time.monotonic()))))
            if result is not None and result.type == result.Type.SUCCESSFUL:
                return result.return_value
            if result is not None and job.get_status(refresh=True) == "failed":
                raise JobFailed(job.id)
            if time.monotonic() > deadline:
                raise TimeoutError(job.id)
            if result is not None:
                time.sleep(0.05)
