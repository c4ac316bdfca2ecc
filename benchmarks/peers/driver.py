"""Measurement of one peer, in a process of the peer's own virtual environment.

`rounds` starts this module with the configuration of the measurement. The module writes the figures to the file
`figures.json` in the folder of the measurement.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.peers import processes, workloads
from benchmarks.peers.adapters.base import BaseAdapter
from benchmarks.peers.config import Config, load
from benchmarks.peers.processes import Meter
from benchmarks.peers.registry import PEERS
from benchmarks.peers.workloads import Lost, Workload

Figures = dict[str, Any]
PAUSE_S = 0.05
"""Pause between two single calls of W5."""


class Killer(threading.Thread):
    """Thread that kills the process of a task when a third of the tasks has ended, and then restarts dead nodes."""

    def __init__(self, adapter: BaseAdapter, log: Path, tasks: int, *, whole_node: bool) -> None:
        super().__init__(daemon=True)
        self._adapter, self._log, self._third, self._whole_node = adapter, log, tasks // 3, whole_node
        self._end = threading.Event()
        self.killed_s: float | None = None
        self.restarts = 0

    def records(self) -> list[list[str]]:
        """Return the records of the log: S or E, number of the task, pid, and time."""
        return [line.split() for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def run(self) -> None:
        while self.killed_s is None and not self._end.wait(0.02):
            self._kill_one()
        while not self._end.wait(0.5):
            self.restarts += self._adapter.restart_dead()

    def _kill_one(self) -> None:
        records = self.records()
        if len({number for kind, number, *_ in records if kind == "E"}) < self._third:
            return
        running: dict[tuple[str, str], list[str]] = {}
        for record in records:
            kind, number, pid, _ = record
            if kind == "S":
                running[number, pid] = record
            else:
                running.pop((number, pid), None)
        if not running:
            return
        victim = int(max(running.values(), key=lambda record: float(record[3]))[2])
        if not (processes.PROC / str(victim)).exists():
            return
        group = self._adapter.node_pids(victim) if self._whole_node else [victim]
        if victim in processes.kill(pid for pid in group if pid != os.getpid()):
            self.killed_s = time.monotonic()

    def stop(self) -> None:
        self._end.set()
        self.join(5)


def run_with_kill(adapter: BaseAdapter, workload: Workload) -> Figures:
    """Run W7 or W7N. Lost tasks are figures of the measurement, and wrong results are an error."""
    assert workload.log
    killer = Killer(adapter, workload.log, len(workload.calls), whole_node=workload.name == "W7N")
    start_s = time.monotonic()
    killer.start()
    results = adapter.map(workload.task, workload.calls, workload.timeout_s)
    end_s = time.monotonic()
    killer.stop()
    workload.check(results, may_lose=True)
    if killer.killed_s is None:
        raise workloads.WrongResults(f"{workload.name}: no process of a task was found and killed.")
    records = killer.records()
    starts, ends = (Counter(number for one, number, *_ in records if one == kind) for kind in "SE")
    lost = [one for one in results if isinstance(one, Lost)]
    return {
        "wall_s": end_s - start_s,
        "after_kill_s": end_s - killer.killed_s,
        "restarts": killer.restarts,
        "results": len(results) - len(lost),
        "lost": len(lost),
        "lost_because": sorted({one.why for one in lost})[:3],
        "started_twice": sum(count > 1 for count in starts.values()),
        "completed_twice": sum(count > 1 for count in ends.values()),
    }


def run_calls(adapter: BaseAdapter, workload: Workload) -> Figures:
    """Run W5: single calls with a pause before each call."""
    results, times_ms = [], []
    for arguments in workload.calls:
        time.sleep(PAUSE_S)
        start_s = time.perf_counter()
        results.append(adapter.call(workload.task, arguments))
        times_ms.append(1000 * (time.perf_counter() - start_s))
    workload.check(results)
    times_ms.sort()
    return {"median_ms": times_ms[len(times_ms) // 2], "p99_ms": times_ms[int(0.99 * len(times_ms))]}


def run_all(adapter: BaseAdapter, workload: Workload, bundle: int) -> Figures:
    """Run W1, W2, W3, or W4, with `bundle` calls in one task of the peer if `bundle` is not 0."""
    start_s = time.perf_counter()
    if bundle:
        starts = range(0, len(workload.calls), bundle)
        bundles = [(workload.task, [list(one) for one in workload.calls[i : i + bundle]]) for i in starts]
        answers = adapter.map("bundle", bundles, workload.timeout_s)
        results = [one for answer in answers for one in ([answer] if isinstance(answer, Lost) else answer)]
    else:
        results = adapter.map(workload.task, workload.calls, workload.timeout_s)
    wall_s = time.perf_counter() - start_s
    workload.check(results)
    figures = {"wall_s": wall_s, "tasks": len(results), "per_s": len(results) / wall_s}
    return figures | ({"efficiency": workload.ideal_s / wall_s} if workload.ideal_s else {})


def measure(adapter: BaseAdapter, name: str, config: Config) -> Figures:
    """Measure one workload on the running grid. Without correct results, return the error instead of figures."""
    workload = workloads.make(name, config.folder, config.scale, config.slow)
    meter = Meter(config.pids)
    try:
        if name in workloads.KILLS:
            figures = run_with_kill(adapter, workload)
        elif name == "W5":
            figures = run_calls(adapter, workload)
        else:
            figures = run_all(adapter, workload, config.bundle)
    except Exception as error:  # noqa: BLE001 - the error of one workload is reported as its result
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    figures["cpu_s"], figures["other_cores"] = meter.read()
    return figures


def measure_quietest(adapter: BaseAdapter, name: str, config: Config) -> Figures:
    """Measure one workload up to `attempts` times, until the machine is quiet. Return the quietest measurement."""
    best: Figures = {}
    for attempt in range(config.attempts):
        processes.wait_until_quiet(config.pids, config.quiet, config.patience)
        figures = measure(adapter, name, config)
        if "error" in figures:
            return figures
        if not best or figures["other_cores"] < best["other_cores"]:
            best = {**figures, "attempts": attempt + 1}
        if best["other_cores"] <= config.noise:
            break
    return best


def measure_start(adapter: BaseAdapter, config: Config) -> Figures:
    """Measure W6, from the start of this process to the results of the first job."""
    meter = Meter(config.pids)
    meter.start_at(config.started_s, config.busy_s)
    workload = workloads.make("W6", config.folder)
    first: list[float] = []
    adapter.start()
    results = adapter.map(workload.task, workload.calls, workload.timeout_s, lambda: first.append(time.monotonic()))
    end_s = time.monotonic()
    workload.check(results)
    figures: Figures = {"first_s": first[0] - config.started_s, "wall_s": end_s - config.started_s}
    figures["cpu_s"], figures["other_cores"] = meter.read()
    return figures


def main() -> None:
    """Measure the workloads of the configuration, and write the figures."""
    config = load()
    module = importlib.import_module(f"benchmarks.peers.adapters.{PEERS[config.peer].module}")
    adapter: BaseAdapter = module.Adapter(config)
    if tuple(config.workloads) == ("W6",):
        figures = {"W6": measure_start(adapter, config)}
    else:
        adapter.start()
        adapter.warm_up()
        figures = {name: measure_quietest(adapter, name, config) for name in config.workloads}
    (config.folder / "figures.json").write_text(json.dumps(figures))
    try:
        adapter.stop()
    finally:
        sys.stdout.flush()
        os._exit(0)  # Threads of a peer must not keep the process.


if __name__ == "__main__":
    main()
