"""MiniStack, an emulator of S3 and SQS, as a child process with its own Python environment.

Invariant: MiniStack gets none of the user's AWS_* variables, and leaves no process behind. The owner of the emulator
stops the emulator. Without an owner, the emulator exits within `ORPHAN_S` seconds (see `ministack_guard`). An
emulator's folder has one owner, and the next owner takes over the running emulator of the previous owner. The folder
contains:

    s3/             objects, each written before it is acknowledged
    state/          queues, written when the emulator stops
    emulator.json   process and port of the running emulator
    owner.lock      lock that the owner holds
    emulator.log    output of the emulator
    keys.json       keys that must sign each request (mode 0600)
    tmp/            temporary files

Each user has one Python environment with MiniStack for all grids. Invariants: MiniStack never uses the user's own
Python environment, because MiniStack pins an exact version of botocore. batchlab uses MiniStack's Python environment
only if its marker file exists, so an incomplete environment is never used. A lock prevents two processes from creating
the environment at the same time.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Self

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local import state_files
from batchlab.core import installation
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import BackendError, Refused, Unreachable, UsageError
from batchlab.core.operating_system.processes import ProcessWatch, boot_id, open_watch, start_mark, watch
from batchlab.core.port_retries import doubled_s

log = logging.getLogger(__name__)

VERSION = "1.5.33"
VARIABLE = "BATCHLAB_MINISTACK"
"""Environment variable that names an installation of MiniStack by its `ministack` program or its Python."""

_MARKER = "batchlab-complete"


def find() -> Path | None:
    """Return the Python that has MiniStack, or None without an installation.

    BATCHLAB_MINISTACK names an installation of MiniStack. Without BATCHLAB_MINISTACK, the installation made by
    `install` is used. Raise UsageError if BATCHLAB_MINISTACK does not name an installation.
    """
    if named := os.environ.get(VARIABLE):
        program = Path(named).expanduser()
        # The Python of a virtual environment is a symbolic link and works only under its own name.
        is_python = program.name.startswith("python")
        python = program if is_python else program.resolve().with_name("python")
        if not (program.is_file() and os.access(python, os.X_OK)):
            raise UsageError(
                f"{VARIABLE} is {named}, but MiniStack is not installed there.",
                remedy="Set the variable to the path of the program `ministack`. If you unset the variable, batchlab "
                "installs MiniStack.",
            )
        return python
    python = environment() / "bin" / "python"
    # The interpreter that created the virtual environment may have been removed.
    return python if (environment() / _MARKER).exists() and python.exists() else None


def provide(say: Callable[[str], None]) -> None:
    """Install MiniStack if it is not installed.

    Raise UsageError if the environment that the user named does not contain MiniStack.
    """
    python = install(say)
    if installed_version(python) is None:
        raise UsageError(
            f"The environment of {python} does not contain MiniStack, uvicorn, and httptools.",
            remedy=f"Install them there (`pip install ministack=={VERSION} uvicorn httptools`). If you unset "
            f"{VARIABLE}, batchlab installs MiniStack.",
        )


def environment() -> Path:
    """Return the folder of MiniStack's environment, which `install` creates in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # The name of the folder differs from the name in release 0.1.0, because release 0.1.0 did not check the hashes of
    # packages.
    return Path(cache) / "batchlab" / f"ministack-{VERSION}-locked"


def requirements() -> Path:
    """Return the file with the requirements of MiniStack and of its server.

    The requirements pin each package to one version, with the hashes of its files.
    """
    return installation.folder("backends") / "ministack" / "requirements.txt"


def install(say: Callable[[str], None]) -> Path:
    """Return the Python that has MiniStack. Create MiniStack's Python environment if the environment does not exist.

    `say` receives a message about the progress of the installation. Raise BackendError if the installation fails.
    """
    if path := find():
        return path
    folder = environment()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path := find():  # Another process created the environment while this process waited for the lock.
                return path
            say(f"Installing MiniStack {VERSION} in {folder}. The next start will use it again.")
            shutil.rmtree(folder, ignore_errors=True)  # A killed process may have left an incomplete folder.
            _make(folder)
            # A marker file is used instead of a rename, because the scripts of an environment contain its path.
            (folder / _MARKER).touch()
    except OSError as error:
        raise BackendError(
            f"MiniStack cannot be installed in {folder}: {error.strerror}.",
            remedy=f"Free some space, set XDG_CACHE_HOME, or name an installation by {VARIABLE}.",
        ) from error
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    python = str(folder / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-input", "--retries", "2"]
    for argv in (
        [sys.executable, "-I", "-m", "venv", str(folder)],
        [*pip, "--require-hashes", "--requirement", str(requirements())],
        [python, "-I", "-c", "import httptools, ministack, uvicorn"],
    ):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            output = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise BackendError(
                f"MiniStack {VERSION} cannot be installed: {pip_reason(output)}.",
                remedy="pip installs it from PyPI, so check the network and pip's settings. Or install it yourself "
                f"(`uv tool install ministack=={VERSION} --with uvicorn,httptools`), and set {VARIABLE} to the path "
                "of its program `ministack`.",
            )


def pip_reason(output: str) -> str:
    """Return the reason of pip's failure from its output, without a full stop."""
    if "DO NOT MATCH THE HASHES" in output:
        return "the package index has a file whose hash differs from the one on record"
    # Without a network, pip's last message wrongly reports that the package does not exist.
    if "connection broken" in output:
        return "the package index cannot be reached"
    return " ".join(output.splitlines()[-1:]).removeprefix("ERROR: ").rstrip(".")


def installed_version(python: Path) -> str | None:
    """Return the version of MiniStack in the environment of that Python.

    Return None if MiniStack or a package of MiniStack's HTTP server is missing.
    """
    code = "import httptools, uvicorn; from importlib.metadata import version; "
    code += "print(version('ministack'))"
    argv = [str(python), "-I", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


ORPHAN_S = 15.0
START_S = 30.0
STOP_S = 10.0

_HOST = "127.0.0.1"
# The emulator's ports are below the range that the kernel uses for outgoing connections. If the kernel gave the port of
# a stopped emulator to a client's own connection, the client could connect to itself.
_PORTS = range(20_000, 32_000)
_PORTS_TRIED = 50
_PROBE_S = 0.2
"""Maximum time in seconds for which a process holds the owner lock only to test whether the emulator has an owner."""
_MAX_RETRY_S = 5.0
"""Maximum wait in seconds between two attempts to start the emulator."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Identity and port of the running emulator process. `start_ticks` is the start mark of the process."""

    port: int
    pid: int
    start_ticks: int
    boot: str
    checks_signatures: bool = False
    """Whether the emulator checks signatures. An emulator that release 0.1.0 started does not check signatures."""


class Emulator:
    """MiniStack over `folder`, listening on 127.0.0.1. A `with` statement starts and stops the emulator.

    With `port` 0, the emulator uses its previous port, or else any free port. The emulator exits `orphan_s` seconds
    after the death of its owner.
    """

    def __init__(self, python: Path, folder: Path, *, port: int = 0, orphan_s: float = ORPHAN_S) -> None:
        self.folder = folder.absolute()
        self.log = self.folder / "emulator.log"
        self._python = python
        self._port = port
        self._orphan_s = orphan_s
        self._owner_lock: IO[str] | None = None
        # This process and the emulator share the listening socket. During a restart of the emulator, clients wait
        # instead of being refused, and no other program gets the port.
        self._listener: socket.socket | None = None
        self._record: _Record | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._watch: ProcessWatch | None = None

    @property
    def url(self) -> str:
        """Return the URL of the started emulator."""
        assert self._record is not None
        return f"http://{_HOST}:{self._record.port}"

    @property
    def endpoint(self) -> Endpoint:
        """Return the endpoint of the started emulator with its keys."""
        keys = state_files.provide_keys(self.folder / state_files.KEYS_FILE)
        return Endpoint(self.url, access_key=keys.access_key, secret_key=keys.secret_key)

    @property
    def pid(self) -> int:
        """Return the process id of the started emulator."""
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
        """Take over the running emulator of the folder or start one, and wait until the emulator answers.

        Raise Refused if the emulator has another owner. Raise Unreachable, with the last line of the emulator's log, if
        the emulator does not start.
        """
        self._own()
        if self.is_running() or (self._take_over() and self._checks_signatures and self._answers()):
            return
        self._end()
        self._spawn()
        if not self._answers():
            raise Unreachable(
                f"The emulator did not start: {_last_line(self.log).rstrip('.')}.", remedy=f"Its log is {self.log}."
            )

    @property
    def _checks_signatures(self) -> bool:
        return self._record is not None and self._record.checks_signatures

    def is_running(self) -> bool:
        """Return whether the emulator that was started or taken over is running."""
        return self._watch is not None and not _readable([self._watch.fileno()], 0)

    def kill(self) -> None:
        """Kill the emulator with SIGKILL, as a fault does, and wait for its end.

        After a kill, `start` starts another emulator.
        """
        self._signal(signal.SIGKILL, STOP_S)

    def stop(self) -> None:
        """Stop the emulator so that it saves its queues. Kill the emulator if the regular stop takes too long."""
        self._end()
        if self._listener:
            self._listener.close()
            self._listener = None
        if self._owner_lock:
            self._owner_lock.close()
            self._owner_lock = None

    async def supervise(self, restarted: Callable[[], None]) -> None:
        """Restart the emulator whenever the emulator ends.

        Call `restarted` after each start of the emulator. `supervise` never returns.
        """
        while True:
            begun_s = time.monotonic()
            await self._wait_for_end()
            log.warning("the emulator (pid %d) has ended. It will be started again.", self.pid)
            wait_s = 0.1
            if time.monotonic() - begun_s < _MAX_RETRY_S:
                await asyncio.sleep(wait_s)  # On a full disk, the emulator ends at every write.
            while not await self._in_thread(partial(self._restart, restarted)):
                await asyncio.sleep(wait_s)
                wait_s = doubled_s(wait_s, _MAX_RETRY_S)

    async def _in_thread(self, call: Callable[[], bool]) -> bool:
        """Return the result of `call`, which runs in a thread.

        A canceled task also waits for the end of `call`, so `stop` cannot run at the same time as `call`.
        """
        calling = asyncio.create_task(asyncio.to_thread(call))
        try:
            return await asyncio.shield(calling)
        finally:
            await asyncio.wait({calling})

    def _restart(self, restarted: Callable[[], None]) -> bool:
        try:
            self.start()
            restarted()
        except (BackendError, OSError) as error:
            log.error("%s", error)
            return False
        return True

    async def _wait_for_end(self) -> None:
        assert self._watch is not None
        loop, ended, descriptor = asyncio.get_running_loop(), asyncio.Event(), self._watch.fileno()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)

    # --- Ownership -------------------------------------------------------------------------------

    def _own(self) -> None:
        if self._owner_lock is not None:
            return
        for name in ("s3", "state", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        file = (self.folder / "owner.lock").open("a")
        give_up_s = time.monotonic() + _PROBE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                # An emulator briefly holds the owner lock to test whether the emulator has an owner.
                if time.monotonic() > give_up_s:
                    file.close()
                    raise Refused(f"Another process already owns the emulator in {self.folder}.") from error
                time.sleep(0.01)
        self._owner_lock = file
        state_files.provide_keys(self.folder / state_files.KEYS_FILE)

    def _take_over(self) -> bool:
        """Take over the process in the record of the emulator. Return False if the recorded process is not running."""
        record = self._read_record()
        watching = watch(record.pid, record.start_ticks, record.boot) if record else None
        if watching is None:
            return False
        self._release()
        self._record, self._watch = record, watching
        return True

    def _read_record(self) -> _Record | None:
        try:
            return _Record(**json.loads((self.folder / "emulator.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    # --- Process ---------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if self._listener is None:
            self._listener = self._listen()
        port, listening = self._listener.getsockname()[1], self._listener.fileno()
        guard = Path(__file__).with_name("ministack_guard.py")
        lock = str(self.folder / "owner.lock")
        argv = [str(self._python), "-I", str(guard), str(listening), lock, str(self._orphan_s)]
        argv.append(str(self.folder / state_files.KEYS_FILE))
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                argv,
                env=self._environment(port),
                cwd=self.folder,
                pass_fds=[listening],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # The owner of the emulator receives Ctrl-C in the terminal.
                start_new_session=True,
            )
        pid = self._child.pid
        self._watch = open_watch(pid)
        self._record = _Record(port, pid, start_mark(pid) or 0, boot_id(), True)
        write_whole(self.folder / "emulator.json", json.dumps(asdict(self._record)))

    def _environment(self, port: int) -> dict[str, str]:
        """Return the complete environment variables of the emulator.

        The emulator does not inherit AWS_* variables, because AWS_* variables would change the emulator's behavior.
        """
        inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return inherited | {
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
                continue  # Another program uses the port.
        raise Unreachable(
            f"All ports that the emulator may use on {_HOST} are in use.", remedy="Stop other programs that use them."
        )

    def _ports(self) -> Iterable[int]:
        port = self._record.port if self._record else self._port
        if port:
            return [port]  # Clients of the emulator know its previous port.
        previous = self._read_record()
        # The emulator of a folder always tries the same ports first. The emulator of another folder most likely tries
        # different ports.
        first = zlib.crc32(bytes(self.folder))
        others = [_PORTS[(first + i) % len(_PORTS)] for i in range(_PORTS_TRIED)]
        return [previous.port, *others] if previous else others

    def _answers(self) -> bool:
        """Wait until the emulator answers a request. Return False if the emulator died or takes too long."""
        assert self._record is not None
        assert self._watch is not None
        ended = self._watch.fileno()
        try:
            with socket.create_connection((_HOST, self._record.port), timeout=START_S) as client:
                client.sendall(b"GET /_ministack/health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
                ready = _readable([client.fileno(), ended], START_S)
                return ended not in ready and b" 200 " in client.recv(64)
        except OSError:
            return False

    def _signal(self, number: signal.Signals, within_s: float) -> bool:
        """Send a signal to the emulator. Return whether the emulator ended within `within_s` seconds."""
        if self._watch is None:
            return True
        with suppress(ProcessLookupError):  # The emulator has already ended.
            self._watch.send_signal(number)
        return bool(_readable([self._watch.fileno()], within_s))

    def _end(self) -> None:
        if not self._signal(signal.SIGTERM, STOP_S):
            log.warning("the emulator (pid %d) did not stop in time. It will be killed.", self.pid)
            self.kill()
        self._release()

    def _release(self) -> None:
        if self._child:
            self._child.wait()
            self._child = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _readable(descriptors: Iterable[int], within_s: float) -> list[int]:
    """Return the descriptors that become readable within `within_s` seconds.

    `poll` is used because `select` does not support descriptors above 1023.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(within_s * 1000)]


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed no error message"
