"""Dask distributed: a local cluster with processes of one thread, with nannies and without the dashboard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from distributed import Client, LocalCluster

from benchmarks.peers import processes
from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, ignore
from benchmarks.peers.tasks import call
from benchmarks.peers.workloads import Lost


class Adapter(BaseAdapter):
    """Adapter of Dask. The nannies are threads of the driver, so a node is a worker process."""

    def start(self) -> None:
        logging.getLogger("distributed").setLevel(logging.ERROR)
        self._cluster = LocalCluster(
            n_workers=self.config.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            local_directory=self.config.work,
        )
        self._client = Client(self._cluster)

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        futures = self._client.map(call, list(repeat(task, len(calls))), calls, pure=False)
        if on_first is not ignore:
            futures[0].result(timeout_s)
            on_first()
        results = list(self._client.gather(futures, errors="skip"))
        if len(results) < len(futures):
            results = [one.result() if one.status == "finished" else Lost(one.status) for one in futures]
        return results

    def call(self, task: str, arguments: Call) -> Any:
        return self._client.submit(call, task, arguments, pure=False).result()

    def node_pids(self, pid: int) -> list[int]:
        return processes.tree(pid)

    def stop(self) -> None:
        self._client.close()
        self._cluster.close()
