"""A grid in containers that a test may damage."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from batchlab.runtime import compose_deployment
from batchlab.server.autoscaling_api.metadata import send_notice
from tests.support.grid.local_grid import LocalGrid
from tests.support.waiting import until

wait_for = partial(until, within_s=240.0, pause_s=0.1)
"""Docker answers slowly, so the deadline is long."""

WORK = """\
import socket, time

def triple(item):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as teller:
        try:
            teller.sendto(str(item).encode(), ({host!r}, {port}))
        except OSError:
            pass  # cut off from the network
    time.sleep({seconds})
    return item * 3

def total(values):
    return sum(values)
"""

JOB = """\
name: chaos
input: {files: items.jsonl, split: items}
stages:
  - {name: triple, python: work:triple, retry: 3}
  - {name: total, python: work:total, gather: all, retry: 3}
"""


class Teller:
    """A counter of task starts. Each task reports its start by a datagram, so the count does not depend on the tested
    grid. The counter does not receive the datagram of a task without a network."""

    def __init__(self, host: str) -> None:
        self.starts: Counter[int] = Counter()
        self.at_s: dict[int, list[float]] = {}
        """The monotonic times at which each task reported a start."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self.address: tuple[str, int] = self._socket.getsockname()
        self._thread = threading.Thread(target=self._listen)

    def _listen(self) -> None:
        while data := self._socket.recv(64):
            self.at_s.setdefault(int(data), []).append(time.monotonic())
            self.starts[int(data)] += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.address)
        self._thread.join()
        self._socket.close()


@dataclass
class Containers:
    """The containers of a running grid on `localstack`."""

    grid: LocalGrid
    done: Counter[str] = field(default_factory=Counter)
    starved: list[str] = field(default_factory=list)
    _undoing: list[threading.Timer] = field(default_factory=list)

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after `seconds`, in a timer."""
        timer = threading.Timer(seconds, act)
        self._undoing.append(timer)
        timer.start()

    def undo(self) -> None:
        """Wait until all calls of `later` are done."""
        for timer in self._undoing:
            timer.join()

    @property
    def at(self) -> compose_deployment.Deployment:
        found = compose_deployment.read(self.grid.home)
        assert found is not None
        return found

    @property
    def host(self) -> str:
        """Return this machine's address on the grid's network."""
        return f"{self.at.subnet}.1"

    def instances(self) -> dict[str, str]:
        """Return the container ids of the running instances by instance id, oldest first."""
        listed = docker(
            "ps",
            "--no-trunc",
            "--format",
            '{{.ID}} {{.Label "batchlab.instance"}}',
            "--filter",
            f"label=batchlab.grid={self.at.project}",
            "--filter",
            "label=batchlab.instance",
            "--filter",
            "status=running",
        )
        rows = [line.split() for line in listed.splitlines()]
        return {instance: container for container, instance in reversed(rows)}

    def service(self, name: str) -> str:
        """Return the container of a service."""
        return docker(
            "ps",
            "-aq",
            "--filter",
            f"label=com.docker.compose.service={name}",
            "--filter",
            f"label=batchlab.grid={self.at.project}",
        ).strip()

    def kill(self, container: str) -> None:
        """Kill the container's first process with SIGKILL from outside, so that Docker reports a crash and not a
        stop."""
        pid = int(docker("inspect", "--format", "{{.State.Pid}}", container))
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pause(self, container: str) -> None:
        docker("pause", container)

    def unpause(self, container: str) -> None:
        """Unpause the container, unless it has ended."""
        if not self.is_gone(container):
            docker("unpause", container)

    def cut_off(self, container: str) -> None:
        """Disconnect the container from the network."""
        docker("network", "disconnect", "--force", self.at.project, container)

    def reconnect(self, container: str) -> None:
        """Reconnect the container to the network, unless the container has ended."""
        if not self.is_gone(container):
            docker("network", "connect", self.at.project, container)

    def starve(self, container: str) -> None:
        """Fill the container's memory until the kernel kills its processes. The filling process is protected from the
        kernel's choice."""
        hog = (
            "import time; open('/proc/self/oom_score_adj','w').write('-1000'); kept=[]\n"
            "while len(kept) < 4096: kept.append(bytearray(b'x' * 1048576))\n"
            "time.sleep(20)"
        )
        subprocess.run(
            [
                "docker",
                "exec",
                "--detach",
                "--privileged",
                "--user",
                "0",
                container,
                "/opt/batchlab/venv/bin/python",
                "-c",
                hog,
            ],
            capture_output=True,
            check=False,
        )
        self.starved.append(container)

    def is_gone(self, container: str) -> bool:
        """Return whether the container does not run any more."""
        asked = ["docker", "inspect", "--format", "{{.State.Running}}", container]
        return subprocess.run(asked, capture_output=True, check=False).stdout.strip() != b"true"

    def restart(self, service: str) -> None:
        """Stop a service as a shutdown of its machine would, and start the service again."""
        docker("restart", "--time", "5", self.service(service))

    def interrupt(self, instance: str, *, notice_s: float) -> None:
        """Send a Spot instance its interruption notice."""
        there = compose_deployment.autoscaling(self.grid.home, self.at)
        send_notice(there, instance, "interruption", notice_s)


def docker(*arguments: str, stderr: bool = False) -> str:
    """Run a docker command, and return its output, with `stderr` also its output on the standard error stream."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert not done.returncode, (arguments, done.stderr)
    return done.stdout + done.stderr if stderr else done.stdout


def write_job(folder: Path, teller: Teller, tasks: int, *, seconds: float) -> Path:
    """Write a job of `tasks` tasks, which report their start and take `seconds` each, and a gather that adds the
    results."""
    folder.mkdir()
    host, port = teller.address
    (folder / "work.py").write_text(WORK.format(host=host, port=port, seconds=seconds))
    (folder / "items.jsonl").write_text("".join(f"{i}\n" for i in range(tasks)))
    (folder / "job.yaml").write_text(JOB)
    return folder / "job.yaml"


class Sizes:
    """A sampler of the number of instances, to check invariant I5."""

    def __init__(self, containers: Containers) -> None:
        self.seen: list[int] = []
        self._containers = containers
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.seen.append(len(self._containers.instances()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
