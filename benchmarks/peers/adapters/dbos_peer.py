"""DBOS: one durable workflow in PostgreSQL for each task, on a queue that the worker processes poll.

A worker takes up to 16 workflows from the queue with one poll, and a lock runs one of them at a time. So two workers
run two tasks at a time, as with the other peers, and the polls do not limit the rate. The driver enqueues many
workflows in one transaction. DBOS stores the status and the result of each workflow. When the process of a worker
starts again with the same executor id, DBOS restarts the workflows that the process had not completed.
"""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Sequence
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient

from benchmarks.peers import tasks
from benchmarks.peers.adapters.base import Call, NodeAdapter, OnFirst, collect, ignore
from benchmarks.peers.config import load

CONFIG = load()
URL = CONFIG.urls["dbos"]
QUEUE = f"peers-{CONFIG.run_id}"
VERSION = "1"
POLL_S = 0.01
RESULT_POLL_S = 0.005
BATCH = 500
"""Workflows that the driver enqueues in one transaction."""
_one_task = threading.Lock()


@DBOS.workflow(name="call")
def call(task: str, arguments: Call) -> Any:
    with _one_task:
        return tasks.call(task, arguments)


def work(executor: str) -> None:
    """Run workflows of the queue until the process ends."""
    DBOS(
        config={
            "name": "peers",
            "system_database_url": URL,
            "executor_id": executor,
            "application_version": VERSION,
            "log_level": "ERROR",
        }
    )
    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    prefetch = 2 if CONFIG.reliable else 16
    DBOS.register_queue(QUEUE, worker_concurrency=prefetch, polling_interval_sec=POLL_S, on_conflict="always_update")
    threading.Event().wait()


class Adapter(NodeAdapter):
    """Adapter of DBOS."""

    one_slot = True

    def start(self) -> None:
        self.start_nodes()
        self._engine = sqlalchemy.create_engine(URL.replace("://", "+psycopg://"))
        self._client = DBOSClient(system_database_engine=self._engine)

    def node(self, number: int, slots: int) -> list[str]:
        return ["-m", __name__, f"{self.config.run_id}-{number}"]

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        job = secrets.token_hex(8)
        ids = [f"{job}-{number:06}" for number in range(len(calls))]
        handles: list[Any] = []
        for start in range(0, len(calls), BATCH):
            batch = zip(ids[start : start + BATCH], calls[start : start + BATCH], strict=True)
            with self._engine.begin() as connection:
                for one, arguments in batch:
                    options = self._options(one)
                    handles.append(self._client.enqueue_in_transaction(connection, options, task, list(arguments)))
        if on_first is not ignore:
            self._result(handles[0])
            on_first()
        # Workflows start in the order of the queue. After the last one, most of the others are complete, too.
        self._result(handles[-1])
        stored = self._client.list_workflows(workflow_id_prefix=job, status="SUCCESS", load_input=False)
        results = {one.workflow_id: one.output for one in stored}
        late = [handle for one, handle in zip(ids, handles, strict=True) if one not in results]
        waited = collect(late, lambda handle, _: self._result(handle), timeout_s, ignore)
        results |= {handle.workflow_id: result for handle, result in zip(late, waited, strict=True)}
        return [results[one] for one in ids]

    def _options(self, workflow_id: str) -> Any:
        return {"queue_name": QUEUE, "workflow_name": "call", "workflow_id": workflow_id, "app_version": VERSION}

    def _result(self, handle: Any) -> Any:
        return handle.get_result(polling_interval_sec=RESULT_POLL_S)

    def call(self, task: str, arguments: Call) -> Any:
        return self._result(self._client.enqueue(self._options(secrets.token_hex(8)), task, list(arguments)))


if __name__ == "__main__":
    work(sys.argv[1])
