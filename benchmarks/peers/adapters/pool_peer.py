"""The process pool of the standard library, which works without a broker and keeps all results in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from typing import Any

from benchmarks.peers.adapters.base import BaseAdapter, Call, OnFirst, ignore
from benchmarks.peers.tasks import call
from benchmarks.peers.workloads import Lost


class Adapter(BaseAdapter):
    """Adapter of the process pool, with chunks of the size `chunksize`."""

    def start(self) -> None:
        self._pool = ProcessPoolExecutor(self.config.workers)

    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        results: list[Any] = []
        chunksize = self.config.options["chunksize"]
        try:
            for result in self._pool.map(call, repeat(task), calls, chunksize=chunksize, timeout=timeout_s):
                if not results:
                    on_first()
                results.append(result)
        except BrokenProcessPool as error:
            results += [Lost(type(error).__name__)] * (len(calls) - len(results))
        return results

    def call(self, task: str, arguments: Call) -> Any:
        return self._pool.submit(call, task, arguments).result()

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
