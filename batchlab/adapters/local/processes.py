"""Instances that are processes of this machine (Linux), each in a session of its own.

Invariant: what is signalled is what was launched. A pid counts only together with the kernel's
start time and boot id from the instance's record, so a recycled number is never mistaken for it.

`<root>/instances/<id>.json` is an instance's record, `<root>/logs/<id>.log` what it printed. The
records outlive the manager: a new launcher over the same root adopts what still runs. An instance
takes its process group with it when it ends, as a machine would.

Processes that are known beyond the life of whoever started them (Linux).

Invariant: a pid counts only together with the kernel's start time and boot id, so a recycled
number is never mistaken for the process that had it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from batchlab.adapters.local.fork_server import Born, Gone, Nursery
from batchlab.core.atomic_write import private, write_whole
from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.model import Machine, Pool
from batchlab.core.ports import ANY_MACHINE, KEEP_ENDED_S, Clock


def boot_id() -> str:
    """Start times count from the boot of the kernel, so they identify a process within one only."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def stat(pid: int) -> list[bytes]:
    """The fields of a process's stat from the third on, empty where there is no such process."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    # The second field is the name in parentheses, and may hold parentheses and blanks.
    return content.rpartition(b")")[2].split()


def start_ticks(pid: int) -> int | None:
    """When a process started, field 22: clock ticks since boot. None unless it lives."""
    fields = stat(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def lives(pid: int, ticks: int, boot: str) -> bool:
    """Whether the process that had this number, start time and boot still runs."""
    return boot == boot_id() and start_ticks(pid) == ticks


def hold(pid: int, ticks: int, boot: str) -> int | None:
    """A pidfd of that process, for the caller to close; None where it does not run any more."""
    # Of a number that a thread of another process has by now the kernel gives no pidfd.
    if not lives(pid, ticks, boot):
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Only now that the pidfd holds on to whatever has the number: before, it could change.
    if not lives(pid, ticks, boot):
        os.close(pidfd)
        return None
    return pidfd


def exit_code(pid: int) -> int | None:
    """How a child of this process has ended, as subprocess gives it, waited for; its number is free
    then. None where it is no child of ours."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status)


log = logging.getLogger(__name__)

INSTANCE_VARIABLE = "BATCHLAB_INSTANCE"
"""Environment variable that holds an instance's id, in it and in what it starts."""

_AWAY = "exited while the manager was away"
_UNKNOWN = "exited; its code is unknown, because what had started it has ended"


@dataclass(slots=True)
class _Record:
    """What the file says. `pid` 0: it was about to be started."""

    instance: str
    pool: str
    boot: str
    pid: int = 0
    start_ticks: int = 0
    ended: str | None = None


@dataclass(slots=True)
class _Process:
    record: _Record
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    pidfd: int = -1
    ended_s: float = 0.0
    """Monotonic."""
    asked: bool = False
    born: bool = False
    """Of our nursery."""
    kill: asyncio.TimerHandle | None = None


class ProcessLauncher:
    """The Launcher port over local processes; one at a time per `root`.

    `argv` gives the command line for a pool's instance, `env` its environment, to which the
    pool's own is added. Where a `nursery` is given, with whose program `argv` begins, instances are
    copies of it, but for those of a pool with an environment of its own. `changed` is set as soon
    as any instance ends; whoever waits clears it.
    """

    def __init__(
        self,
        root: Path,
        argv: Callable[[Pool, str], Sequence[str]],
        clock: Clock,
        env: Mapping[str, str],
        nursery: Nursery | None = None,
    ) -> None:
        self.changed = asyncio.Event()
        self._records = root / "instances"
        self._logs = root / "logs"
        self._argv = argv
        self._clock = clock
        self._env = env
        self._nursery = nursery
        self._burying: set[asyncio.Task[None]] = set()
        self._processes: dict[str, _Process] | None = None

    async def launch(
        self,
        pool: Pool,
        instance: str,
        machine: Machine = ANY_MACHINE,  # noqa: ARG002 - all are alike here
    ) -> None:
        """As the port says; BackendError where the program cannot be started, AlreadyExists where
        the id was used in the last minutes."""
        processes = self._adopted()
        if instance in processes:
            raise AlreadyExists(f"instance {instance} exists already")
        record = _Record(instance, pool.name, boot_id())
        process = _Process(record)
        argv = list(self._argv(pool, instance))
        born: Born | None = None
        try:
            # Written before the start as well: a manager that dies in between leaves a record
            # without pid, and the instance is then found by its environment.
            self._write(record)
            born = await self._born(argv, pool, instance)
            process.born = born is not None
            record.pid = born.pid if born else self._spawn(argv, pool, instance)
            record.start_ticks = start_ticks(record.pid) or 0
            self._write(record)
            self._watch(process, os.pidfd_open(record.pid))
            if born:
                born.begin()
        except OSError as error:
            self._undo(process)
            raise BackendError(f"{argv[0]!r} cannot be started: {error}") from error
        except asyncio.CancelledError:
            self._undo(process)
            raise
        finally:
            if born:
                born.forget()
        processes[instance] = process
        log.info("launched as process %d", record.pid, extra=_about(record))

    async def terminate(self, instance: str, *, grace_s: float) -> None:
        """As the port says. Asked again, the earlier of the two deadlines holds; an instance that
        is unknown or has ended is left alone."""
        process = self._adopted().get(instance)
        # One that has ended may not have been buried yet.
        if process is None or process.record.ended is not None or process.pidfd < 0:
            return
        if not process.asked:
            process.asked = True
            # It may have exited without our having heard of it yet.
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGTERM)
        loop = asyncio.get_running_loop()
        due_s = loop.time() + grace_s
        if process.kill is None or due_s < process.kill.when():
            if process.kill is not None:
                process.kill.cancel()
            process.kill = loop.call_at(due_s, _kill_group, process.record)

    async def running(self) -> Mapping[str, str | None]:
        """As the port says; the end of an instance is remembered for ten minutes."""
        processes = self._adopted()
        now_s = self._clock.monotonic_s()
        for name, process in list(processes.items()):
            if process.record.ended is not None and now_s - process.ended_s > KEEP_ENDED_S:
                del processes[name]
                self._path(name).unlink(missing_ok=True)
        return {name: process.record.ended for name, process in processes.items()}

    async def close(self, *, kill: bool) -> None:
        """Let go of every instance; with `kill` end all at once and wait until they have."""
        living = [p for p in self._adopted().values() if p.record.ended is None]
        if kill:
            for process in living:
                _kill_group(process.record)
            await asyncio.gather(*(process.gone.wait() for process in living))
        for process in living:
            self._let_go(process)
        if self._nursery:
            await asyncio.gather(*self._burying)
            self._nursery.close()

    def _undo(self, process: _Process) -> None:
        record = process.record
        self._let_go(process)  # nobody is to hear of its end
        if record.pid:
            os.killpg(record.pid, signal.SIGKILL)
            if not process.born:
                os.waitpid(record.pid, 0)
        self._path(record.instance).unlink(missing_ok=True)

    async def _born(self, argv: list[str], pool: Pool, instance: str) -> Born | None:
        """A copy of the nursery; None where there is none, or it would not do."""
        # Much of what the environment says is read when a program starts.
        if self._nursery is None or pool.env:
            return None
        try:
            with self._log_of(instance) as output:
                return await self._nursery.bear(argv, {INSTANCE_VARIABLE: instance}, output)
        except Gone as error:
            log.warning(
                "instances start more slowly, since what they are copies of is gone: %s", error
            )
            return None

    def _log_of(self, instance: str) -> BinaryIO:
        self._logs.mkdir(parents=True, exist_ok=True)
        return open(self._logs / f"{instance}.log", "ab", opener=private)

    def _spawn(self, argv: list[str], pool: Pool, instance: str) -> int:
        env = {**self._env, **dict(pool.env), INSTANCE_VARIABLE: instance}
        with self._log_of(instance) as log:
            # Not os.posix_spawn: it cannot close what the manager itself inherited, and a worker
            # that holds the pipe of `batchlab up | tee` keeps it open for good.
            child = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Its end is waited for here and not by Popen, which must not complain when it is dropped.
        child.returncode = 0
        return child.pid

    def _watch(self, process: _Process, pidfd: int) -> None:
        process.pidfd = pidfd
        asyncio.get_running_loop().add_reader(process.pidfd, self._exited, process)

    def _exited(self, process: _Process) -> None:
        # While it is a zombie its number is not reused, so the group goes first.
        _kill_group(process.record)
        self._let_go(process)
        if process.born and self._nursery:
            burying = asyncio.get_running_loop().create_task(self._bury(process, self._nursery))
            self._burying.add(burying)
            burying.add_done_callback(self._burying.discard)
        else:
            self._buried(process, exit_code(process.record.pid))

    async def _bury(self, process: _Process, nursery: Nursery) -> None:
        self._buried(process, await nursery.end_of(process.record.pid))

    def _buried(self, process: _Process, code: int | None) -> None:
        self._ended(process, _UNKNOWN if code is None else f"exit {code}")

    def _ended(self, process: _Process, how: str) -> None:
        process.record.ended = how
        process.ended_s = self._clock.monotonic_s()
        process.gone.set()
        self.changed.set()
        log.info("ended: %s", how, extra=_about(process.record))
        try:
            self._write(process.record)
        except OSError as error:
            # A full disk. A manager after us finds no such process, which says nearly as much.
            about = {"instance": process.record.instance}
            log.warning("how the instance ended is not kept: %s", error, extra=about)

    def _let_go(self, process: _Process) -> None:
        if process.kill is not None:
            process.kill.cancel()
        if process.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(process.pidfd)
            os.close(process.pidfd)
            process.pidfd = -1

    def _adopted(self) -> dict[str, _Process]:
        """The instances; the first call takes over those of earlier managers."""
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
            self._ended(process, record.ended)
        elif record.boot != boot_id():
            self._ended(process, "ended with a restart of the machine")
        else:
            if not record.pid:
                record.pid = _leader_of(record.instance)
                record.start_ticks = start_ticks(record.pid) or 0
            if self._watches(process):
                self._write(record)
            else:
                self._lost(process)

    def _watches(self, process: _Process) -> bool:
        record = process.record
        pidfd = hold(record.pid, record.start_ticks, record.boot)
        if pidfd is None:
            return False
        self._watch(process, pidfd)
        return True

    def _lost(self, process: _Process) -> None:
        if process.record.pid:
            _kill_group(process.record)
        self._ended(process, _AWAY)

    def _path(self, instance: str) -> Path:
        return self._records / f"{instance}.json"

    def _write(self, record: _Record) -> None:
        self._records.mkdir(parents=True, exist_ok=True)
        # A power cut ends the instance too, so the record need not outlive it.
        write_whole(self._path(record.instance), json.dumps(asdict(record)), durable=False)

    def _read(self, path: Path) -> _Record:
        try:
            return _Record(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            # Cut short by a power failure, or of another version: look for it by its environment.
            return _Record(path.stem, "", boot_id())


def _about(record: _Record) -> dict[str, str]:
    return {"instance": record.instance, "pool": record.pool}


def living(root: Path) -> dict[str, int]:
    """The processes of the instances that live, by instance: for whoever stands outside of the
    manager that launches in `root`."""
    found = {}
    for path in (root / "instances").glob("*.json"):
        try:
            record = _Record(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # it goes, or was never finished: there is nobody whom it surely names
        if record.ended is None and lives(record.pid, record.start_ticks, record.boot):
            found[record.instance] = record.pid
    return found


def ended(root: Path, instance: str) -> str:
    """How the record says that the instance ended; "" while it says nothing of that."""
    try:
        fields = json.loads((root / "instances" / f"{instance}.json").read_text())
    except (FileNotFoundError, ValueError):
        return ""
    return str(fields.get("ended") or "")


def _leader_of(instance: str) -> int:
    """The process that was started as `instance`, by its environment; 0 where there is none."""
    wanted = f"{INSTANCE_VARIABLE}={instance}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            # Another user's, or one that ended during the look: neither is ours.
            continue
        fields = stat(int(folder.name))
        # What an instance starts inherits its environment; field 6, the session, is its own pid.
        if wanted in environment and fields and fields[3] == folder.name.encode():
            return int(folder.name)
    return 0


def _kill_group(record: _Record) -> None:
    """SIGKILL to the instance's process group, unless its number belongs to another by now."""
    # A leader that is gone is no proof that its group is empty; members keep the number taken. A
    # stranger could get it only between these two lines, after the kernel used up all others.
    if start_ticks(record.pid) in (None, record.start_ticks):
        with suppress(ProcessLookupError):
            os.killpg(record.pid, signal.SIGKILL)
