"""Functions with which other processes start, find, stop, and kill a grid's manager.

Invariant: the record in the home names the running manager. A process that starts a manager waits until the manager's
record exists, or reports why the manager did not start.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from batchlab.adapters.local.processes import GRID_VARIABLE
from batchlab.core import installation, logs
from batchlab.core.atomic_write import private
from batchlab.core.capabilities import capabilities_of, check_pool_images, check_shared_gpus
from batchlab.core.errors import BackendError, Refused, Unreachable, UsageError
from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import arguments_of, boot_id, start_mark, watch, with_variable
from batchlab.runtime import compose_deployment, factory
from batchlab.runtime.descriptor import images_of, pool_option
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord

log = logging.getLogger(__name__)

START_S = 30.0
CONNECT_S = 660.0
"""Timeout in seconds for the connection to a manager on AWS.

The timeout is longer than the time for which the connection process waits for the boot of the manager's instance.
"""
SLOW_S = 10.0
POLL_S = 0.004
"""Interval in seconds of the checks whether a manager has started or ended. A check takes 0.05 ms."""
STOP_S = 30.0
# With -P, Python does not import modules from the current folder.
_MODULE = ["-P", "-m", "batchlab"]
_SERVICES = ("manager", "connect")
_STARTED: dict[int, subprocess.Popen[bytes]] = {}
"""Managers that this process has started, by pid.

The Popen objects are stored, because Python warns about a dropped Popen. A child process that has ended stays a zombie
until its parent waits for the child process.
"""


@dataclass(frozen=True, slots=True)
class ManagerStart:
    """A manager that is starting. The caller must call `wait`, or `cancel` if an error prevents the call of `wait`."""

    wait: Callable[[], ManagerRecord]
    """Return the record of the manager when the manager has recorded its address.

    Raise Unreachable with the last line of the manager's log if the manager does not start.
    """
    cancel: Callable[[], None]
    """End the process that `begin_manager` started. A later call of `cancel` does not have an effect."""


def start_manager(
    home: Home,
    backend: Backend,
    *,
    pools: Sequence[Pool] = (),
    parent: bool = False,
    port: int = 0,
    say: Callable[[str], None] = log.info,
) -> ManagerRecord:
    """Start a manager as `begin_manager` does, and return its record. If a manager already runs, return its record."""
    start = begin_manager(home, backend, pools=pools, parent=parent, port=port, say=say)
    return start if isinstance(start, ManagerRecord) else start.wait()


def begin_manager(
    home: Home,
    backend: Backend,
    *,
    pools: Sequence[Pool] = (),
    parent: bool = False,
    port: int = 0,
    say: Callable[[str], None] = log.info,
) -> ManagerStart | ManagerRecord:
    """Start a manager without waiting for it. If a manager already runs, return its record. The containers of a
    manager in a container start when the caller waits.

    With `parent`, the manager ends when this process ends. `port` is the manager's port on 127.0.0.1, and 0 takes a
    free port. `say` is called with messages about slow steps. The manager of a stack runs on AWS, so the function
    starts a process that connects to the manager. Raise the errors of `Backend.provide`.
    """
    home.require_folder()
    if running := home.record():
        return running
    check_pool_images(backend.name, backend.capabilities, images_of(pools))
    backend.check_installed()
    if backend.capabilities.shares_gpus:
        check_shared_gpus(pools)
    _reap()
    if backend.capabilities.container_manager:
        from batchlab.runtime import container_grid

        # `up` removes the containers if it fails.
        return ManagerStart(lambda: container_grid.up(home, backend, pools, say), lambda: None)
    home.make()
    backend.provide(home, say)
    if images := images_of(pools):
        pools = _provide_images(home, pools, images, say)
    service, problem = _SERVICES[0], "The manager did not start"
    if backend.capabilities.remote_manager:
        _check_pools(backend, home, pools)
        service, problem = _SERVICES[1], "The manager on AWS cannot be reached"
    argv = [sys.executable, *_MODULE, service, "--home", str(home.path)]
    argv += ["--backend", backend.name]
    if backend.endpoint:
        argv += ["--endpoint", backend.endpoint]
    for pool in pools:
        argv += ["--pool", pool_option(pool)]
    if parent:
        argv += ["--parent", str(os.getpid())]
    if port:
        argv += ["--port", str(port)]
    with open(home.manager_log, "ab", opener=private) as output:
        # Start the manager in a new session, so that Ctrl-C in the terminal does not end the manager.
        process = subprocess.Popen(
            argv,
            env={**os.environ, GRID_VARIABLE: str(home.path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    _STARTED[process.pid] = process
    return ManagerStart(lambda: _wait_for_start(home, backend, process, problem, say), process.terminate)


def _wait_for_start(
    home: Home, backend: Backend, process: subprocess.Popen[bytes], problem: str, say: Callable[[str], None]
) -> ManagerRecord:
    try:
        if backend.capabilities.remote_manager:
            record = _wait_for_record(home, process, CONNECT_S, say)
        else:
            record = _wait_for_record(home, process, START_S)
    except BaseException:
        # Terminate the connection process, because the process would otherwise keep trying to connect.
        if backend.capabilities.remote_manager:
            process.terminate()
        raise
    if record:
        return record
    raise Unreachable(
        f"{problem}: {_last_line(home.manager_log).rstrip('.')}.", remedy=f"Its log is {home.manager_log}."
    )


def _provide_images(
    home: Home, pools: Sequence[Pool], images: Mapping[str, str], say: Callable[[str], None]
) -> list[Pool]:
    """Provide the images of pools before the manager starts, and return the pools with the digests of their images."""
    from batchlab.runtime import pool_images

    installation.need("docker", "A pool with an image", "docker")
    provided = pool_images.provide_all(images, home.fleet / "image.log", say)
    return [replace(pool, image=provided[pool.name].reference) if pool.image else pool for pool in pools]


def _check_pools(backend: Backend, home: Home, pools: Sequence[Pool]) -> None:
    stack = backend.stack(home).stack
    if pools:
        raise UsageError(
            f"The stack {stack!r} has its own pools, so a client cannot set their sizes.",
            remedy="Change the pools with `batchlab deploy apply --pool`, or their limits with `batchlab grid scale`.",
        )


def _wait_for_record(
    home: Home, process: subprocess.Popen[bytes], within_s: float, say: Callable[[str], None] | None = None
) -> ManagerRecord | None:
    """Return the record of the manager `process`, or of a manager that another command has started at the same time.

    Return None if no manager starts within `within_s` seconds. `say` is called once if the start takes longer than
    `SLOW_S` seconds.
    """
    begun_s = time.monotonic()
    while (waited_s := time.monotonic() - begun_s) < within_s:
        has_ended = process.poll() is not None
        record = home.record()
        if record and (has_ended or record.pid == process.pid):
            return record
        if has_ended and not home.is_locked:
            return home.record()
        if say and waited_s > SLOW_S:
            say("The manager is not ready yet. An instance takes some minutes to boot.")
            say = None
        time.sleep(POLL_S)
    return None


def has_started(home: Home, record: ManagerRecord | None) -> bool:
    """Return whether this process started the manager, or created the manager's containers."""
    if record is None or _is_in_container(record):
        return compose_deployment.is_created_here(home)
    return record.pid in _STARTED


def _is_in_container(record: ManagerRecord) -> bool:
    return capabilities_of(record.backend).container_manager


def settled_record(home: Home) -> ManagerRecord | None:
    """Return the record of the manager of the home, or None if no manager runs. Wait for a manager that still starts.

    Raise Unreachable if the manager does not record its address within `START_S` seconds. If the grid has containers,
    do not wait, because they can be stopped without the record of their manager.
    """
    deadline_s = time.monotonic() + START_S
    while (record := home.record()) is None and home.is_locked and compose_deployment.read(home) is None:
        if time.monotonic() > deadline_s:
            raise Unreachable(
                f"The manager in {home.path} has been starting for {START_S:.0f} s.",
                remedy=f"Its log is {home.manager_log}.",
            )
        time.sleep(POLL_S)
    return record


def stop_manager(home: Home) -> bool:
    """Stop the manager of the home and the manager's instances. Return False if no manager runs, or if the manager
    still starts (see `settled_record`)."""
    home.require_folder()
    record = home.record()
    _reap()
    if compose_deployment.read(home) and (record is None or _is_in_container(record)):
        from batchlab.runtime import container_grid

        return container_grid.down(home, factory.load(compose_deployment.NAME))
    if record is None:
        return False
    if _is_in_container(record):
        # The recorded pid is valid only inside the manager's container. Outside the container, the pid belongs to
        # another process.
        raise BackendError(
            f"The manager of {home.path} runs in a container, but the home does not record which one.",
            remedy="Remove the container with `batchlab gc`.",
        )
    mark = start_mark(record.pid)
    with suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_S
    # As soon as this manager has removed its record, another command may start the next manager and write its record.
    while ((current := home.record()) is not None and current.owner == record.owner) or (
        mark is not None and start_mark(record.pid) == mark
    ):
        if time.monotonic() > deadline_s:
            raise BackendError(
                f"The manager (pid {record.pid}) has not ended after {STOP_S:.0f} s.",
                remedy=f"Its log is {home.manager_log}.",
            )
        time.sleep(POLL_S)
    if started := _STARTED.pop(record.pid, None):
        started.wait()
    return True


@dataclass(frozen=True, slots=True)
class GridProcesses:
    """Running processes of one grid on this machine: its manager, instances, and their child processes."""

    folder: str
    pids: tuple[int, ...]
    marks: tuple[int, ...]
    """Start mark of each process."""

    @property
    def is_orphan(self) -> bool:
        """Whether the grid's folder was deleted. `grid down` ends the processes of other grids."""
        return not Home(Path(self.folder)).is_made


def grid_processes() -> list[GridProcesses]:
    """Return the user's running processes of grids on this machine, by folder.

    A process belongs to the grid that its environment variable BATCHLAB_GRID names.
    """
    found: dict[str, dict[int, int]] = {}
    for pid, folder in with_variable(GRID_VARIABLE):
        mark = start_mark(pid)
        # A grid sets an absolute path. Any other value is a user's own variable with this name.
        if Path(folder).is_absolute() and mark is not None:
            found.setdefault(folder, {})[pid] = mark
    return [GridProcesses(folder, tuple(marks), tuple(marks.values())) for folder, marks in sorted(found.items())]


def kill_others(home: Home, has_folder: Callable[[], bool] = lambda: True) -> int:
    """Kill the processes of the grid in the home, except this process and managers, and return their number.

    The caller must hold the lock of the home. Managers continue to run, because another command may have started the
    next manager, which waits for the lock. `has_folder` returns whether the grid still has its folder. If the grid lost
    its folder, another grid may use the same path. The function then kills only processes that were running while the
    path was not the folder of a grid.
    """
    # A grid makes its folder before it starts a process, so the check after the listing covers all processes.
    return sum(kill_processes(found) for found in _others(home) if has_folder() or found.is_orphan)


def kill_leftovers(home: Home) -> int:
    """Kill the processes that a killed manager of the grid has left, and return their number.

    Return 0 if the last manager has taken the grid down, or if another manager runs.
    """
    if not home.last_owner() or home.is_taken_down:
        return 0
    # A starting manager waits only briefly for the lock, so the slow listing comes before the lock.
    others = _others(home)
    with suppress(Refused), home.lock():
        return sum(map(kill_processes, others))
    return 0


def _others(home: Home) -> list[GridProcesses]:
    """Return the processes of the grid in the home, except managers."""
    others = []
    for found in grid_processes():
        if os.path.realpath(found.folder) == os.path.realpath(home.path):
            pairs = [pair for pair in zip(found.pids, found.marks, strict=True) if not _is_manager(pair[0])]
            others.append(GridProcesses(found.folder, tuple(p for p, _ in pairs), tuple(mark for _, mark in pairs)))
    return others


def _is_manager(pid: int) -> bool:
    """Return whether the process is a manager, which has the arguments that `begin_manager` uses."""
    _, *arguments = arguments_of(pid) or [""]
    return arguments[:3] == _MODULE and arguments[3:4] in ([service] for service in _SERVICES)


def kill_processes(processes: GridProcesses) -> int:
    """Send SIGKILL to the processes, except this process, and return their number. Ignore ended processes."""
    others = [found for found in zip(processes.pids, processes.marks, strict=True) if found[0] != os.getpid()]
    for pid, mark in others:
        if watching := watch(pid, mark, boot_id()):
            with suppress(ProcessLookupError):
                watching.send_signal(signal.SIGKILL)
            watching.close()
    return len(others)


def kill_manager(home: Home) -> ManagerRecord | None:
    """Send SIGKILL to the manager of the home, to inject a fault, and wait until the manager has ended.

    Return the record of the killed manager, or None if no manager was running.
    """
    home.require_folder()
    record = home.record()
    if record is None:
        return None
    with suppress(ProcessLookupError):
        os.kill(record.pid, signal.SIGKILL)
    if started := _STARTED.pop(record.pid, None):
        started.wait()
    while (current := home.record()) is not None and current.owner == record.owner:
        time.sleep(0.01)
    return record


@atexit.register
def _reap() -> None:
    """Wait for ended managers that this process started, so that the managers do not stay zombies."""
    for pid, process in list(_STARTED.items()):
        if process.poll() is not None:
            _STARTED.pop(pid, None)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return logs.text_of(lines[-1]) if lines else "it printed no error message"
