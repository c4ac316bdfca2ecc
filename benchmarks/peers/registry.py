"""The peers of the benchmark, with their virtual environments, services, and pinned packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PACKAGES: Mapping[str, Sequence[str]] = {
    "main": (
        "celery[redis,sqs]==5.7.0",
        "kombu==5.7.0",
        "redis==8.1.0",
        "dramatiq[redis]==2.2.1",
        "rq==3.0.0",
        "dask[distributed]==2026.8.0",
        "luigi==3.8.1",
    ),
    "ray": ("ray==2.60.0",),
    "parsl": ("parsl==2026.10.26",),
    "dbos": ("dbos==3.4.0",),
    "prefect": ("prefect==3.9.1",),
}
"""Packages by virtual environment. Ray, Parsl, DBOS, and Prefect limit the versions of packages that others need."""


@dataclass(frozen=True)
class Peer:
    """One scheduler in one configuration."""

    title: str
    module: str
    """Module of the adapter, below `adapters`."""
    venv: str = ""
    """Virtual environment. Peers without one run in the project's own environment."""
    services: Sequence[str] = ()
    program: str = ""
    """Program that the peer needs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    slow: float = 1.0
    """Factor for the number of tasks of W1, W2, and W4, for peers that would need minutes."""
    skips: Sequence[str] = ()
    """Workloads that the benchmark does not run with the peer."""
    is_default: bool = True

    @property
    def versions(self) -> list[str]:
        """Return the pinned packages of the peer's own name, such as "celery 5.7.0"."""
        name = self.module.removesuffix("_peer")
        pins = [pin.partition("[")[0].partition("=")[0] + pin[pin.index("==") :] for pin in PACKAGES.get(self.venv, ())]
        return [pin.replace("==", " ") for pin in pins if pin.startswith(name)]


PEERS: Mapping[str, Peer] = {
    "batchlab_local": Peer("batchlab, `local`", "batchlab_peer", options={"backend": "local"}),
    "batchlab_ministack": Peer(
        "batchlab, `ministack`", "batchlab_peer", services=["aws"], options={"backend": "ministack"}
    ),
    "ppe1": Peer("ProcessPoolExecutor", "pool_peer", options={"chunksize": 1}),
    "ppe64": Peer("ProcessPoolExecutor, chunks of 64", "pool_peer", options={"chunksize": 64}, is_default=False),
    "dask": Peer("Dask distributed", "dask_peer", "main"),
    "ray": Peer("Ray", "ray_peer", "ray"),
    "parsl": Peer("Parsl HTEX", "parsl_peer", "parsl"),
    "celery_redis": Peer(
        "Celery + Redis", "celery_peer", "main", ["redis"], options={"broker": "redis", "results": "redis"}
    ),
    "celery_sqs": Peer(
        "Celery + SQS", "celery_peer", "main", ["redis", "aws"], options={"broker": "sqs", "results": "redis"}, slow=0.2
    ),
    "celery_sqs_s3": Peer(
        "Celery + SQS, results in S3",
        "celery_peer",
        "main",
        ["aws"],
        options={"broker": "sqs", "results": "s3"},
        slow=0.2,
        is_default=False,
    ),
    "dramatiq": Peer("Dramatiq + Redis", "dramatiq_peer", "main", ["redis"]),
    "rq": Peer(
        "RQ (Worker)", "rq_peer", "main", ["redis"], options={"worker": "rq.Worker"}, slow=0.2, is_default=False
    ),
    "rq_simple": Peer("RQ (SimpleWorker)", "rq_peer", "main", ["redis"], options={"worker": "rq.SimpleWorker"}),
    "dbos": Peer("DBOS + PostgreSQL", "dbos_peer", "dbos", ["dbos"]),
    "prefect": Peer(
        "Prefect (flow)",
        "prefect_peer",
        "prefect",
        ["postgres", "prefect"],
        options={"background": False},
        slow=0.1,
        skips=("W7", "W7N"),
    ),
    "prefect_background": Peer(
        "Prefect (background tasks)",
        "prefect_peer",
        "prefect",
        ["postgres", "prefect"],
        options={"background": True},
        slow=0.01,
    ),
    "luigi": Peer("Luigi", "luigi_peer", "main", slow=0.1),
    "parallel": Peer("GNU parallel", "parallel_peer", program="parallel", slow=0.2),
}
"""The peers by name, in the order of the tables."""
