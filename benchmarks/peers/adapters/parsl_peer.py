"""Parsl: the HighThroughputExecutor on this machine, with one manager for each node."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parsl
from parsl.config import Config as ParslConfig
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

from benchmarks.peers import processes
from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, collect, ignore
from benchmarks.peers.tasks import call

POOL = b"process_worker_pool"


class Adapter(BaseAdapter):
    """Adapter of Parsl."""

    def start(self) -> None:
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        nodes, reliable = self.config.nodes, self.config.reliable
        executor = HighThroughputExecutor(
            label="htex",
            address="127.0.0.1",
            max_workers_per_node=self.config.workers // nodes,
            cores_per_worker=0.1,
            prefetch_capacity=0 if reliable else 64,
            encrypted=False,
            provider=LocalProvider(init_blocks=nodes, min_blocks=nodes, max_blocks=nodes),
            **({"heartbeat_period": 2, "heartbeat_threshold": 10} if reliable else {}),
        )
        settings = ParslConfig(
            executors=[executor],
            run_dir=str(self.config.folder / "runinfo"),
            usage_tracking=0,
            initialize_logging=False,
            retries=5 if reliable else 0,
            strategy="simple" if reliable else "none",
            **({"strategy_period": 1} if reliable else {}),
        )
        self._kernel = parsl.load(settings)
        self._call = parsl.python_app(call)

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        futures = [self._call(task, arguments) for arguments in calls]
        return collect(futures, lambda future, seconds: future.result(seconds), timeout_s, on_first)

    def node_pids(self, pid: int) -> list[int]:
        """Return the processes of the manager above the worker `pid`."""
        while POOL in (processes.PROC / str(above := processes.parent(pid)) / "cmdline").read_bytes():
            pid = above
        return processes.tree(pid)

    def stop(self) -> None:
        self._kernel.cleanup()
