"""Launcher of instances that are local processes, each in its own session.

Invariant: signals reach only processes that this launcher or an earlier launcher started. A process is identified by
its pid, its start mark, and the boot id, so a reused pid is never mistaken for the earlier process.

The file `<root>/instances/<id>.json` is the record of an instance, and `<root>/logs/<id>.log` has the instance's
output. The records of instances outlive the manager, so a new launcher over the same root adopts the running instances.
When an instance ends, its process group is killed, like the processes of a machine that ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from batchlab.adapters.local.fork_server import ForkServer, ForkServerEndedError, PendingFork
from batchlab.core.atomic_write import private, write_whole
from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.model import Machine, Pool
from batchlab.core.operating_system.processes import (
    ProcessWatch,
    boot_id,
    exit_code,
    is_alive,
    kill_group,
    open_watch,
    session_leader,
    start_mark,
    watch,
)
from batchlab.core.ports import ANY_MACHINE, KEEP_ENDED_S, Clock
from batchlab.core.text import process_end

log = logging.getLogger(__name__)

INSTANCE_VARIABLE = "BATCHLAB_INSTANCE"
"""Environment variable with the instance's id. The child processes of an instance inherit BATCHLAB_INSTANCE."""
GRID_VARIABLE = "BATCHLAB_GRID"
"""Environment variable with the path of the grid's folder, which the processes of a grid on this machine inherit.

The emulator does not have the variable, because it saves its queues and ends when its grid has ended."""

_EXITED_UNSEEN = "exited while no manager was running"
_UNKNOWN = "exited; its exit code is unknown, because the fork server that started it has ended"


@dataclass(slots=True)
class _Record:
    """Content of an instance's record file.

    `pid` is 0 before the start of the process. `start_ticks` is the start mark of the process.
    """

    instance: str
    pool: str
    boot: str
    pid: int = 0
    start_ticks: int = 0
    ended: str | None = None


@dataclass(slots=True)
class _Process:
    record: _Record
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    watch: ProcessWatch | None = None
    ended_s: float = 0.0
    """Monotonic time of the end of the process."""
    is_stopping: bool = False
    is_fork: bool = False
    """Whether the process is a fork of the fork server."""
    kill: asyncio.TimerHandle | None = None


class ProcessLauncher:
    """The Launcher port over local processes. Only one launcher may use a `root` at a time.

    `argv` returns the command line of a pool's instance. `env` is the environment of instances, to which the pool's own
    variables are added. With a `fork_server`, `argv` must begin with the server's program. With a `fork_server`,
    instances are its forks, except in pools with their own environment. When an instance ends, the launcher removes the
    folder `scratch`/<id>, and sets `changed`. The task that waits for `changed` clears `changed`.
    """

    def __init__(
        self,
        root: Path,
        argv: Callable[[Pool, str], Sequence[str]],
        clock: Clock,
        env: Mapping[str, str],
        fork_server: ForkServer | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.changed = asyncio.Event()
        self._records = root / "instances"
        self._logs = root / "logs"
        self._argv = argv
        self._clock = clock
        self._env = env
        self._fork_server = fork_server
        self._scratch = scratch
        self._background: set[asyncio.Task[None]] = set()
        self._processes: dict[str, _Process] | None = None

    def prepare(self) -> None:
        """Start the fork server, so that the first launch does not wait for the imports of the fork server."""
        if self._fork_server is None:
            return
        try:
            self._fork_server.start()
        except OSError as error:  # The next launch tries again, and starts without a fork server if that fails.
            log.info("the fork server did not start: %s", error)

    async def launch(
        self,
        pool: Pool,
        instance: str,
        machine: Machine = ANY_MACHINE,  # noqa: ARG002 - all machines are alike here
    ) -> None:
        processes = self._adopt_processes()
        if instance in processes:
            raise AlreadyExists(f"Instance {instance} already exists.")
        record = _Record(instance, pool.name, boot_id())
        process = _Process(record)
        argv = list(self._argv(pool, instance))
        fork: PendingFork | None = None
        try:
            # The record of the instance is also written before the process starts. If the manager dies during the
            # launch, the record lacks a pid, and the next manager finds the instance by its environment.
            self._write(record)
            fork = await self._fork(argv, pool, instance)
            process.is_fork = fork is not None
            record.pid = fork.pid if fork else self._spawn(argv, pool, instance)
            record.start_ticks = start_mark(record.pid) or 0
            self._write(record)
            self._watch(process, open_watch(record.pid))
            if fork:
                fork.begin()
        except OSError as error:
            self._undo(process)
            raise BackendError(f"{argv[0]!r} cannot be started: {error}") from error
        except asyncio.CancelledError:
            self._undo(process)
            raise
        finally:
            if fork:
                fork.close()
        processes[instance] = process
        log.info("launched as process %d", record.pid, extra=_about(record))

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        process = self._adopt_processes().get(instance)
        # An instance may have ended while its exit code is not yet known.
        if process is None or process.record.ended is not None or process.watch is None:
            return
        if not process.is_stopping:
            process.is_stopping = True
            # The process may have exited before this launcher noticed the exit.
            with suppress(ProcessLookupError):
                process.watch.send_signal(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        due_s = loop.time() + grace_s
        if process.kill is None or due_s < process.kill.when():
            if process.kill is not None:
                process.kill.cancel()
            process.kill = loop.call_at(due_s, _kill_group, process.record)

    async def running(self) -> Mapping[str, str | None]:
        processes = self._adopt_processes()
        now_s = self._clock.monotonic_s()
        for name, process in list(processes.items()):
            if process.record.ended is not None and now_s - process.ended_s > KEEP_ENDED_S:
                del processes[name]
                self._path(name).unlink(missing_ok=True)
        return {name: process.record.ended for name, process in processes.items()}

    async def close(self, *, kill: bool) -> None:
        living = [p for p in self._adopt_processes().values() if p.record.ended is None]
        if kill:
            for process in living:
                _kill_group(process.record)
            await asyncio.gather(*(process.exited.wait() for process in living))
        for process in living:
            self._release(process)
        while ending := list(self._background):  # The end of an instance starts the removal of its folder.
            await asyncio.gather(*ending)
            # A wait for ended tasks does not give the loop a chance to run their callbacks.
            self._background.difference_update(ending)
        self.end_fork_server()

    def end_fork_server(self) -> None:
        """End the fork server, for example of a manager that cannot start. Running instances continue."""
        if self._fork_server:
            self._fork_server.close()

    def _undo(self, process: _Process) -> None:
        record = process.record
        self._release(process)  # The end of an instance whose launch failed must not be reported.
        if record.pid:
            kill_group(record.pid)
            if not process.is_fork:
                os.waitpid(record.pid, 0)
        self._path(record.instance).unlink(missing_ok=True)

    async def _fork(self, argv: list[str], pool: Pool, instance: str) -> PendingFork | None:
        """Return a fork of the fork server, or None if the fork server cannot be used."""
        # A program reads most of its environment at its start, so a fork cannot change the environment.
        if self._fork_server is None or pool.env:
            return None
        try:
            with self._open_log(instance) as output:
                return await self._fork_server.fork(argv, {INSTANCE_VARIABLE: instance}, output)
        except ForkServerEndedError as error:
            log.warning("instances start more slowly without the fork server: %s", error)
            return None

    def _open_log(self, instance: str) -> BinaryIO:
        self._make(self._logs)
        return open(self._logs / f"{instance}.log", "ab", opener=private)

    def _spawn(self, argv: list[str], pool: Pool, instance: str) -> int:
        env = {**self._env, **dict(pool.env), INSTANCE_VARIABLE: instance}
        with self._open_log(instance) as log:
            # subprocess.Popen is used, because os.posix_spawn cannot close the descriptors that the manager inherited.
            # A worker that inherits the pipe of `batchlab up | tee` would keep the pipe open.
            child = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        # The launcher itself waits for the end of the process. The return code is set, so Python does not warn when the
        # Popen object is deleted.
        child.returncode = 0
        return child.pid

    def _watch(self, process: _Process, watching: ProcessWatch) -> None:
        process.watch = watching
        asyncio.get_running_loop().add_reader(watching.fileno(), self._on_exit, process)

    def _on_exit(self, process: _Process) -> None:
        # The pid of a zombie process is not reused, so the process group is killed before the wait.
        _kill_group(process.record)
        self._release(process)
        if process.is_fork and self._fork_server:
            self._start(self._reap(process, self._fork_server))
        else:
            self._end(process, _end_text(exit_code(process.record.pid)))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _reap(self, process: _Process, fork_server: ForkServer) -> None:
        self._end(process, _end_text(await fork_server.exit_code(process.record.pid)))

    def _end(self, process: _Process, how: str) -> None:
        process.record.ended = how
        process.ended_s = self._clock.monotonic_s()
        process.exited.set()
        self.changed.set()
        log.info("ended: %s", how, extra=_about(process.record))
        if self._scratch:
            # Instances never have the id of an earlier instance, so no other instance uses the folder.
            self._start(_remove(self._scratch / process.record.instance))
        try:
            self._write(process.record)
        except OSError as error:
            # The record cannot be written, for example because the disk is full. The next manager does not find the
            # process, so that manager reports the end of the instance.
            log.warning("the end of the instance cannot be recorded: %s", error, extra=_about(process.record))

    def _release(self, process: _Process) -> None:
        if process.kill is not None:
            process.kill.cancel()
        if process.watch is not None:
            asyncio.get_running_loop().remove_reader(process.watch.fileno())
            process.watch.close()
            process.watch = None

    def _adopt_processes(self) -> dict[str, _Process]:
        """Return the instances of this launcher by id. The first call adopts the instances of earlier managers."""
        if self._processes is None:
            self._processes = {}
            for path in sorted(self._records.glob("*.json")):
                process = _Process(self._read(path))
                self._processes[process.record.instance] = process
                self._adopt(process)
        return self._processes

    def _adopt(self, process: _Process) -> None:
        record = process.record
        if record.ended is not None:
            self._end(process, record.ended)
        elif record.boot != boot_id():
            self._end(process, "ended with a restart of the machine")
        else:
            if not record.pid:
                # Child processes of an instance inherit its environment, but do not lead its session.
                record.pid = session_leader(INSTANCE_VARIABLE, record.instance) or 0
                record.start_ticks = start_mark(record.pid) or 0
            watching = watch(record.pid, record.start_ticks, record.boot)
            if watching is not None:
                self._watch(process, watching)
                self._write(record)
                return
            if record.pid:
                _kill_group(record)
            self._end(process, _EXITED_UNSEEN)

    @staticmethod
    def _make(folder: Path) -> None:
        # The folder of a deleted grid must not be created again, so the parent of the root must exist.
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)

    def _path(self, instance: str) -> Path:
        return self._records / f"{instance}.json"

    def _write(self, record: _Record) -> None:
        self._make(self._records)
        # A power loss also ends the instance, so its record need not survive a power loss.
        write_whole(self._path(record.instance), json.dumps(asdict(record)), durable=False)

    def _read(self, path: Path) -> _Record:
        try:
            record = _Record(**json.loads(path.read_text()))
            if record.instance != path.stem:
                raise ValueError(record.instance)
            return record
        except (ValueError, TypeError):
            # The record file is damaged or of another version. The launcher finds the instance of a damaged record by
            # its environment.
            return _Record(path.stem, "", boot_id())


async def _remove(folder: Path) -> None:
    # A program that a task left running may still write into the folder.
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _end_text(code: int | None) -> str:
    return _UNKNOWN if code is None else process_end(code)


def _about(record: _Record) -> dict[str, str]:
    return {"instance": record.instance, "pool": record.pool}


def living(root: Path) -> dict[str, int]:
    """Return the pids of the running instances, by instance id.

    `living` is for processes other than the manager that launches in `root`.
    """
    pids = {}
    for path in (root / "instances").glob("*.json"):
        try:
            record = _Record(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # The record is being removed or is incomplete, so the record does not identify a process.
        if record.ended is None and is_alive(record.pid, record.start_ticks, record.boot):
            pids[record.instance] = record.pid
    return pids


def end_of(root: Path, instance: str) -> str:
    """Return the text about the end of the instance in the record of the instance, or "" without an end."""
    try:
        fields = json.loads((root / "instances" / f"{instance}.json").read_text())
    except (FileNotFoundError, ValueError):
        return ""
    return str(fields.get("ended") or "")


def _kill_group(record: _Record) -> None:
    """Send SIGKILL to the instance's process group, unless its pid was reused."""
    # A process group may have members after its leader has ended, and these members keep the pid from being reused.
    # Another process could get the pid only between the check and the kill, after the kernel has used all other pids.
    if start_mark(record.pid) in (None, record.start_ticks):
        kill_group(record.pid)
