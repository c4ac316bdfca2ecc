"""Base class of the adapters.

One adapter runs tasks with one peer in one configuration. The driver calls an adapter in this order:

    adapter = Adapter(config)
    adapter.start()                         start the workers
    adapter.warm_up()                       not for W6
    adapter.map(task, calls, …)             run all calls of a workload, and return the results in order
    adapter.call(task, arguments)           run one call (W5)
    adapter.node_pids(pid)                  processes of the node in which `pid` runs a task (W7N)
    adapter.restart_dead()                  restart the nodes that the peer does not restart (W7, W7N)
    adapter.stop()

To add a peer, add a module with a class `Adapter`, and an entry in `registry.py`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.peers import processes
from benchmarks.peers.config import Config
from benchmarks.peers.workloads import Lost

Call = Sequence[Any]
OnFirst = Callable[[], None]


def ignore() -> None:
    """Do nothing when the first result arrives."""


class BaseAdapter(ABC):
    """Adapter of a peer that starts and restarts its own processes."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def start(self) -> None:
        """Start the workers."""

    @abstractmethod
    def map(self, task: str, calls: Sequence[Call], timeout_s: float, on_first: OnFirst = ignore) -> list[Any]:
        """Run all calls of one task, and return the results in order, with `Lost` for each lost task."""

    def call(self, task: str, arguments: Call) -> Any:
        """Run one call, and return its result."""
        return self.map(task, [arguments], timeout_s=60.0)[0]

    @abstractmethod
    def stop(self) -> None:
        """Stop the workers."""

    def warm_up(self) -> None:
        """Run a few tasks, so that each worker has started."""
        self.map("nap", [(i, 150) for i in range(2 * self.config.workers)], timeout_s=60.0)

    def restart_dead(self) -> int:
        """Restart the nodes that do not run, and return their number."""
        return 0

    def node_pids(self, pid: int) -> list[int]:
        """Return all processes of the node to which `pid` belongs."""
        return [pid]


class NodeAdapter(BaseAdapter):
    """Adapter that starts and restarts the nodes of its peer."""

    one_slot = False
    """Whether a node of the peer has exactly one slot, so the peer needs as many nodes as workers."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._nodes: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def node(self, number: int, slots: int) -> list[str]:
        """Return the arguments of Python for one node with `slots` workers."""

    def start_nodes(self) -> None:
        """Start all nodes."""
        count = self.config.workers if self.one_slot else self.config.nodes
        self._slots = self.config.workers // count
        self._nodes = [self._start_node(number) for number in range(count)]

    def _start_node(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, *self.node(number, self._slots)]
        with (self.config.folder / f"node{number}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.config.work, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        processes.stop(self._nodes)

    def restart_dead(self) -> int:
        dead = [number for number, node in enumerate(self._nodes) if node.poll() is not None]
        for number in dead:
            self._nodes[number] = self._start_node(number)
        return len(dead)

    def node_pids(self, pid: int) -> list[int]:
        trees = (processes.tree(node.pid) for node in self._nodes)
        return next((members for members in trees if pid in members), super().node_pids(pid))


def collect(
    handles: Iterable[Any], result: Callable[[Any, float], Any], timeout_s: float, on_first: OnFirst
) -> list[Any]:
    """Return the results of `handles` in order.

    `result(handle, seconds)` waits for one result for at most `seconds`. If it raises an error, the task is lost.
    """
    deadline = time.monotonic() + timeout_s
    results: list[Any] = []
    for handle in handles:
        try:
            results.append(result(handle, max(0.05, deadline - time.monotonic())))
        except Exception as error:  # noqa: BLE001 - whatever a peer raises, it did not return the result
            results.append(Lost(type(error).__name__))
        if len(results) == 1:
            on_first()
    return results
