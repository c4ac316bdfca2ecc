"""MiniStack, an emulator of S3 and SQS, as a child process from an environment of its own.

Invariant: it takes nothing of the user's AWS_* variables along, and no process of it is left
behind: its owner stops it, and without an owner it ends by itself within `ORPHAN_S` (see
ministack_guard). A folder has one owner; the next one takes over what the one before it has left
running. In the folder:

    s3/     objects, each written before it is acknowledged     state/  queues, on a clean stop
    emulator.json   who runs, and where     owner.lock  held by the owner     emulator.log    tmp/
    keys.json       the keys that requests must be signed with (0600)
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Self

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local import access_keys
from batchlab.adapters.local.ministack_install import VERSION, find, install, provide
from batchlab.adapters.local.processes import boot_id, hold, start_ticks
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.core.retry import doubled_s

__all__ = ["VERSION", "Emulator", "find", "install", "provide"]

log = logging.getLogger(__name__)

ORPHAN_S = 15.0
START_S = 30.0
STOP_S = 10.0

_HOST = "127.0.0.1"
# Below the ports that the kernel hands out for outgoing connections: a client that tries to reach
# an emulator that is just not there could else be given this very port, and talk to itself.
_PORTS = range(20_000, 32_000)
_PORTS_TRIED = 50
_PROBED_S = 0.2
"""For longer than this nobody holds the lock only to see whether it is taken."""
_AGAIN_S = 5.0
"""Longest wait between two tries to start one that does not come up."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Who runs, and where; see pids."""

    port: int
    pid: int
    start_ticks: int
    boot: str
    checks_signatures: bool = False
    """False for an emulator that release 0.1.0 started, which answers everybody."""


class Emulator:
    """MiniStack over `folder`, listening on 127.0.0.1; `with` starts and stops it.

    `port` 0 means the last one, else any that is free. `orphan_s` is how long it survives an
    owner that dies.
    """

    def __init__(
        self, python: Path, folder: Path, *, port: int = 0, orphan_s: float = ORPHAN_S
    ) -> None:
        self.folder = folder.absolute()
        self.log = self.folder / "emulator.log"
        self._python = python
        self._port = port
        self._orphan_s = orphan_s
        self._owner_lock: IO[str] | None = None
        # Ours as well as the emulator's: who calls while it is started again is not refused, but
        # waits, and nobody else gets the port.
        self._listener: socket.socket | None = None
        self._record: _Record | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1

    @property
    def url(self) -> str:
        """Where it listens, once started."""
        assert self._record is not None
        return f"http://{_HOST}:{self._record.port}"

    @property
    def endpoint(self) -> Endpoint:
        """The emulator with its keys, once started."""
        known = access_keys.provide(self.folder / access_keys.FILE)
        return Endpoint(self.url, access_key=known.access_key, secret_key=known.secret_key)

    @property
    def pid(self) -> int:
        """Its process, once started."""
        assert self._record is not None
        return self._record.pid

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Take over the one that runs in the folder, else start one; returns when it answers.

        Refused while it has another owner; Unreachable with the last line of its log.
        """
        self._own()
        if self.is_running() or (self._take_over() and self._is_usable()):
            return
        self._end()
        self._spawn()
        if not self._answers():
            raise Unreachable(
                f"The emulator did not start: {_last_line(self.log).rstrip('.')}.",
                remedy=f"Its log is {self.log}.",
            )

    def _is_usable(self) -> bool:
        assert self._record is not None
        return self._record.checks_signatures and self._answers()

    def is_running(self) -> bool:
        """Whether the process that we have started or taken over lives."""
        return self._pidfd >= 0 and not _readable([self._pidfd], 0)

    def kill(self) -> None:
        """SIGKILL, as a fault would; returns when it is dead. `start` starts another."""
        self._signal(signal.SIGKILL, STOP_S)

    def stop(self) -> None:
        """End it so that it writes down its queues, by force if that takes too long."""
        self._end()
        if self._listener:
            self._listener.close()
            self._listener = None
        if self._owner_lock:
            self._owner_lock.close()
            self._owner_lock = None

    async def supervise(self, again: Callable[[], None]) -> None:
        """Start it again whenever it ends, for ever; `again` is called after each start."""
        while True:
            begun_s = time.monotonic()
            await self._ended()
            log.warning("the emulator (pid %d) has ended, and is started again", self.pid)
            wait_s = 0.1
            if time.monotonic() - begun_s < _AGAIN_S:
                await asyncio.sleep(wait_s)  # on a full disk it ends at every write
            while not await self._in_thread(partial(self._started_again, again)):
                await asyncio.sleep(wait_s)
                wait_s = doubled_s(wait_s, _AGAIN_S)

    async def _in_thread(self, call: Callable[[], bool]) -> bool:
        """Its answer; cancelled, it waits all the same: `stop` must not come in between."""
        calling = asyncio.create_task(asyncio.to_thread(call))
        try:
            return await asyncio.shield(calling)
        finally:
            await asyncio.wait({calling})

    def _started_again(self, again: Callable[[], None]) -> bool:
        try:
            self.start()
            again()
        except (BackendError, OSError) as error:
            log.error("%s", error)
            return False
        return True

    async def _ended(self) -> None:
        loop, ended, pidfd = asyncio.get_running_loop(), asyncio.Event(), self._pidfd
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)

    # --- Whose it is -----------------------------------------------------------------------------

    def _own(self) -> None:
        if self._owner_lock is not None:
            return
        for name in ("s3", "state", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        file = (self.folder / "owner.lock").open("a")
        give_up_s = time.monotonic() + _PROBED_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # An emulator that asks whether it has an owner holds it for a moment.
                if time.monotonic() > give_up_s:
                    file.close()
                    raise Refused(f"The emulator in {self.folder} has an owner already.") from error
                time.sleep(0.01)
        self._owner_lock = file
        access_keys.provide(self.folder / access_keys.FILE)

    def _take_over(self) -> bool:
        """Hold on to the emulator on record; False where it does not live any more."""
        record = self._on_record()
        if record is None:
            return False
        pidfd = hold(record.pid, record.start_ticks, record.boot)
        if pidfd is None:
            return False
        self._let_go()
        self._record, self._pidfd = record, pidfd
        return True

    def _on_record(self) -> _Record | None:
        try:
            return _Record(**json.loads((self.folder / "emulator.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    # --- Its life --------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if self._listener is None:
            self._listener = self._listen()
        port, listening = self._listener.getsockname()[1], self._listener.fileno()
        guard = Path(__file__).with_name("ministack_guard.py")
        lock = str(self.folder / "owner.lock")
        argv = [str(self._python), "-I", str(guard), str(listening), lock, str(self._orphan_s)]
        argv.append(str(self.folder / access_keys.FILE))
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                argv,
                env=self._environment(port),
                cwd=self.folder,
                pass_fds=[listening],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C in the terminal is its owner's to handle.
                start_new_session=True,
            )
        pid = self._child.pid
        self._pidfd = os.pidfd_open(pid)
        self._record = _Record(port, pid, start_ticks(pid) or 0, boot_id(), True)
        write_whole(self.folder / "emulator.json", json.dumps(asdict(self._record)))

    def _environment(self, port: int) -> dict[str, str]:
        """All of it: the user's own variables would reach an emulator that reads AWS_*."""
        kept = {
            name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
        }
        return kept | {
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "GATEWAY_PORT": str(port),
            "BIND_HOST": _HOST,
            "SERVICES": "s3,sns,sqs,sts",
            "PERSIST_STATE": "1",
            "STATE_DIR": str(self.folder / "state"),
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(self.folder / "s3"),
            "IOT_MTLS_ENABLED": "0",
            "LOG_LEVEL": "WARNING",
        }

    def _listen(self) -> socket.socket:
        for port in self._ports():
            try:
                return socket.create_server((_HOST, port), backlog=256)
            except OSError:
                continue  # taken
        raise Unreachable(
            f"The emulator finds no free port on {_HOST}.", remedy="End what else listens there."
        )

    def _ports(self) -> Iterable[int]:
        known = self._record.port if self._record else self._port
        if known:
            return [known]  # its callers know it by this one
        before = self._on_record()
        # The same folder begins with the same port, another one most likely with another.
        first = zlib.crc32(bytes(self.folder))
        others = [_PORTS[(first + i) % len(_PORTS)] for i in range(_PORTS_TRIED)]
        return [before.port, *others] if before else others

    def _answers(self) -> bool:
        """Wait until it answers; False where it has died, or takes too long."""
        assert self._record is not None
        try:
            with socket.create_connection((_HOST, self._record.port), timeout=START_S) as caller:
                caller.sendall(b"GET /_ministack/health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                ready = _readable([caller.fileno(), self._pidfd], START_S)
                return self._pidfd not in ready and b" 200 " in caller.recv(64)
        except OSError:
            return False

    def _signal(self, number: signal.Signals, within_s: float) -> bool:
        """Whether it has ended within that time."""
        if self._pidfd < 0:
            return True
        with suppress(ProcessLookupError):  # it has ended by itself
            signal.pidfd_send_signal(self._pidfd, number)
        return bool(_readable([self._pidfd], within_s))

    def _end(self) -> None:
        if not self._signal(signal.SIGTERM, STOP_S):
            log.warning("the emulator (pid %d) has not ended, and is killed", self.pid)
            self.kill()
        self._let_go()

    def _let_go(self) -> None:
        if self._child:
            self._child.wait()
            self._child = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _readable(descriptors: Iterable[int], within_s: float) -> list[int]:
    """Those that become readable; not select(), which knows none above 1023."""
    poll = select.poll()
    for one in descriptors:
        poll.register(one, select.POLLIN)
    return [one for one, _ in poll.poll(within_s * 1000)]


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"
