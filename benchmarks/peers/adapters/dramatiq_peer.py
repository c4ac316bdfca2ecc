"""Dramatiq with Redis as the broker and for the results, with processes of one thread.

Dramatiq acknowledges a message after its task. The messages of a lost worker return after the heartbeat timeout. The
driver and the workers import this module, which configures Dramatiq for both.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend
from redis.exceptions import TimeoutError as SocketTimeout

from benchmarks.peers import tasks
from benchmarks.peers.adapters.base import Call, NodeAdapter, OnFirst, collect, ignore
from benchmarks.peers.config import load

CONFIG = load()
os.environ["dramatiq_queue_prefetch"] = "2" if CONFIG.reliable else "16"  # noqa: SIM112 - Dramatiq's name

broker = RedisBroker(
    url=CONFIG.urls["redis"],
    namespace=f"peers-{CONFIG.run_id}",
    heartbeat_timeout=10_000 if CONFIG.reliable else 60_000,
    # Commands in a million after which Dramatiq searches for dead workers.
    maintenance_chance=50_000 if CONFIG.reliable else 1_000,
)
broker.add_middleware(Results(backend=RedisBackend(url=CONFIG.urls["redis"]), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="peers", max_retries=5, min_backoff=100)
def call(task: str, arguments: Call) -> Any:
    return tasks.call(task, arguments)


class Adapter(NodeAdapter):
    """Adapter of Dramatiq."""

    def start(self) -> None:
        self.start_nodes()

    def node(self, number: int, slots: int) -> list[str]:
        return ["-m", "dramatiq", __name__, "--processes", str(slots), "--threads", "1", "--skip-logging"]

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        job = dramatiq.group([call.message(task, list(arguments)) for arguments in calls]).run()
        return collect(job.children, self._result, timeout_s, on_first)

    def _result(self, message: Any, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return message.get_result(block=True, timeout=int(1000 * max(0.05, deadline - time.monotonic())))
            except SocketTimeout:  # By default, redis-py ends a blocking read after 5 s.
                if time.monotonic() > deadline:
                    raise

    def call(self, task: str, arguments: Call) -> Any:
        return call.send(task, list(arguments)).get_result(block=True, timeout=60_000)
