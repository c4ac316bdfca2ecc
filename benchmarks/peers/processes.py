"""Processes of the machine, read from /proc: their tree, their CPU time, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks.peers.config import VARIABLE

TICK = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def pids() -> Iterator[int]:
    return (int(path.name) for path in PROC.iterdir() if path.name.isdigit())


def fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name of the program. Raise OSError without such a process."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def parent(pid: int) -> int:
    return int(fields(pid)[1])


def tree(pid: int) -> list[int]:
    """Return `pid` and all its descendants."""
    children: dict[int, list[int]] = {}
    for one in pids():
        with suppress(OSError):
            children.setdefault(parent(one), []).append(one)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def machine_cpu_s() -> float:
    """Return the CPU time used on the whole machine since its boot."""
    values = [int(one) for one in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(values[:3]) + values[5] + values[6]) / TICK  # user, nice, system, irq, softirq


def service_cpu_s(pid: int) -> float:
    """Return the CPU time of a service: its processes, and the ended children of its first process."""
    total = 0
    for one in tree(pid):
        with suppress(OSError):
            total += sum(int(ticks) for ticks in fields(one)[11 : 15 if one == pid else 13])
    return total / TICK


def marked(config: str) -> Iterator[int]:
    """Return the processes that have the configuration file `config` in their environment."""
    mark = f"{VARIABLE}={config}\0".encode()
    for pid in pids():
        with suppress(OSError):
            if mark in (PROC / str(pid) / "environ").read_bytes():
                yield pid


def marked_cpu_s(config: str) -> float:
    """Return the CPU time of the processes with the configuration `config`, and of their ended children."""
    total = 0
    for pid in marked(config):
        with suppress(OSError):
            total += sum(int(ticks) for ticks in fields(pid)[11:15])
    return total / TICK


class Meter:
    """CPU times since the creation of the meter, by role.

    The roles are the driver (this process), each service, and the workers (all other processes of the measurement).
    """

    def __init__(self, services: Mapping[str, int], config: str | None = None) -> None:
        """`config` is the configuration file of the measurement, by default the one of this process."""
        self._services = services
        self._config = config or os.environ[VARIABLE]
        self._start = {role: service_cpu_s(pid) for role, pid in services.items()}
        self._own_s = marked_cpu_s(self._config)
        self._wall_s, self._machine_s, self._driver_s = time.monotonic(), machine_cpu_s(), time.process_time()

    def start_at(self, wall_s: float, machine_s: float) -> None:
        """Move the start back to the start of this process."""
        self._wall_s, self._machine_s, self._own_s, self._driver_s = wall_s, machine_s, 0.0, 0.0

    def read(self) -> tuple[dict[str, float], float]:
        """Return the CPU seconds by role, and the number of cores that other programs used meanwhile."""
        driver_s, wall_s = time.process_time() - self._driver_s, time.monotonic() - self._wall_s
        machine_s, own_s = machine_cpu_s() - self._machine_s, marked_cpu_s(self._config) - self._own_s
        services = {role: service_cpu_s(pid) - self._start[role] for role, pid in self._services.items()}
        total_s = own_s + sum(services.values())
        roles = {"driver": driver_s, "workers": max(0.0, own_s - driver_s), **services, "total": total_s}
        return roles, max(0.0, machine_s - total_s) / max(wall_s, 0.05)


def wait_until_quiet(services: Mapping[str, int], limit: float, patience_s: float, config: str | None = None) -> None:
    """Wait until other programs use fewer than `limit` cores, for at most `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        meter = Meter(services, config)
        time.sleep(0.7)
        if meter.read()[1] < limit or time.monotonic() > deadline:
            return
        time.sleep(1.5)


def kill(pids: Iterable[int]) -> list[int]:
    """Kill the processes with SIGKILL. Return the pids of the processes that existed."""
    killed = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    return killed


def stop(processes: Iterable[subprocess.Popen[bytes]], how: signal.Signals = signal.SIGTERM) -> None:
    """Stop child processes and all their descendants: with the signal `how`, and after 5 s with SIGKILL."""
    running = [(process, tree(process.pid)) for process in processes if process.poll() is None]
    for process, _ in running:
        process.send_signal(how)
    deadline = time.monotonic() + 5.0
    for process, members in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        kill(pid for pid in members if pid != process.pid or process.poll() is None)
        process.wait(5)


def working_in(folder: Path) -> Iterator[int]:
    """Return the processes with `folder` as their working directory."""
    for pid in pids():
        with suppress(OSError):
            if (PROC / str(pid) / "cwd").readlink() == folder.resolve():
                yield pid
