"""Celery with the prefork pool: Redis or SQS as the broker, and Redis or S3 for the results.

The driver and the workers import this module, which configures Celery for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery, group
from celery.exceptions import TimeoutError as ResultTimeout

from benchmarks.peers import tasks
from benchmarks.peers.adapters.base import Call, NodeAdapter, OnFirst, ignore
from benchmarks.peers.config import load
from benchmarks.peers.workloads import Lost

CONFIG = load()
BUCKET, REGION, KEY = "peers", "us-east-1", "test"
_IN_S3 = CONFIG.options["results"] == "s3"


def _settings() -> dict[str, Any]:
    settings: dict[str, Any] = {
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_default_queue": f"peers-{CONFIG.run_id}",
        "result_expires": 3600,
        "worker_prefetch_multiplier": 64,
        "broker_connection_retry_on_startup": True,
        "worker_hijack_root_logger": False,
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
    }
    transport: dict[str, Any] = {}
    if CONFIG.options["broker"] == "redis":
        settings["broker_url"] = CONFIG.urls["redis"]
    else:
        settings["broker_url"] = f"sqs://{KEY}:{KEY}@{CONFIG.urls['aws'].partition('//')[2]}//"
        transport |= {"region": REGION, "is_secure": False, "polling_interval": 0, "wait_time_seconds": 5}
    if CONFIG.reliable:
        settings |= {"task_acks_late": True, "task_reject_on_worker_lost": True, "worker_prefetch_multiplier": 1}
        transport["visibility_timeout"] = 10
        if CONFIG.options["broker"] == "redis":
            # By default, Celery restores the messages of a lost node after about 95 s.
            transport |= {"unacked_restore_interval": 2, "unacked_restore_throttle": 1}
    settings["broker_transport_options"] = transport
    if _IN_S3:
        settings |= {"result_backend": "s3", "s3_bucket": BUCKET, "s3_base_path": f"{CONFIG.run_id}/"}
        settings |= {"s3_endpoint_url": CONFIG.urls["aws"], "s3_region": REGION}
        settings |= {"s3_access_key_id": KEY, "s3_secret_access_key": KEY}
    else:
        settings["result_backend"] = CONFIG.urls["redis"]
    return settings


app = Celery("peers")
app.conf.update(_settings())


@app.task(name="call")
def call(task: str, arguments: Call) -> Any:
    return tasks.call(task, arguments)


class Adapter(NodeAdapter):
    """Adapter of Celery."""

    def start(self) -> None:
        if _IN_S3:
            import boto3

            # The driver's environment has the keys.
            boto3.client("s3", endpoint_url=CONFIG.urls["aws"], region_name=REGION).create_bucket(Bucket=BUCKET)
        self.start_nodes()

    def node(self, number: int, slots: int) -> list[str]:
        arguments = ["-m", "celery", "-A", __name__, "worker", "-c", str(slots), "-n", f"node{number}@peers"]
        return [*arguments, "-l", "WARNING", "--without-gossip", "--without-mingle"]

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        job = group([call.s(task, list(arguments)) for arguments in calls]).apply_async()
        if on_first is not ignore:
            job.results[0].get(timeout=timeout_s)
            on_first()
        try:
            if _IN_S3:
                values = [one.get(timeout=timeout_s, propagate=False, interval=0.02) for one in job.results]
            else:
                values = job.get(timeout=timeout_s, propagate=False)
        except ResultTimeout as error:
            values = [one.result if one.ready() else error for one in job.results]
        return [Lost(type(one).__name__) if isinstance(one, BaseException) else one for one in values]

    def call(self, task: str, arguments: Call) -> Any:
        wait = {"interval": 0.005} if _IN_S3 else {}
        return call.delay(task, list(arguments)).get(timeout=60, **wait)
