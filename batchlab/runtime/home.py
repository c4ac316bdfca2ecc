"""Folder of a grid: its files, the record of its manager, and the manager's sockets.

Invariants: every file in the folder survives SIGKILL, and the names of the files show the state of the grid.
`fetched.jsonl` has one line for each fetch of results. One write appends each line of `fetched.jsonl`, so concurrent
fetches do not lose lines.

    objects/        the bucket           queue.sqlite    the queues
    ledger.sqlite   the ledger           fleet/          instance records, logs, group state
    manager.json    the running manager  manager.lock    locked while the manager runs
    manager.sock    the manager's Unix socket (0600); socket.json records its path
    token           the API's bearer token (0600)
    scratch/        the workers' unpacked code and task folders
    damaged/        objects that `doctor --repair` has moved away
    reports/        performance data that was fetched from other buckets
    settings.toml   settings of the manager that override its backend's; optional
    notify.toml     notification targets of the grid; optional
    fetched.jsonl   bytes that were read for each fetch of results to this machine
    sessions.json   sessions of the web page that were ended before they expired
    open-*.html     file that opens the page in a browser (0600), while `grid open` waits
    records/        records of replays of scenarios
    BACKEND/        files of another backend, such as endpoint.json (the location of its bucket),
                    ledger.sqlite, queue.sqlite, and the state of its emulator or its containers
    aws/            locations of the parts of a stack on AWS, for clients on this machine
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, Any

from batchlab.core import installation
from batchlab.core.atomic_write import make_folder, private, write_once, write_whole
from batchlab.core.errors import Refused, UsageError
from batchlab.core.protocol import object_keys

log = logging.getLogger(__name__)

DEFAULT = ".batchlab"

_FOLDERS = frozenset({"objects", "fleet", "scratch", "wake", "replies", "records", "reports", "damaged"})
_FILES = re.compile(
    r"\.gitignore|\.batchlab-made|token|manager\.(json|lock|log|sock)|(ledger|queue)\.sqlite.*"
    r"|(settings|notify|prices)\.toml|fetched\.jsonl|sessions\.json|open-.*\.html"
)
"""Names of the grid's own files in its folder. The user may have other files in the grid's folder."""
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
PROBE_S = 0.2
"""Maximum time in seconds for which a check of the manager's lock holds the lock."""


@dataclass(frozen=True, slots=True)
class ManagerRecord:
    """Record of a running manager, with the URL of the manager's API and the manager's name as owner of the lease.

    If `parent` is not 0, the manager ends when the process with the pid `parent` ends.
    """

    url: str
    pid: int
    owner: str
    backend: str
    parent: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a grid's bucket and queues: an endpoint and a bucket.

    `named` is true if the user named the endpoint. If `named` is false, the endpoint is the grid's own emulator. During
    a replay with a proxy, `url` is the URL of the proxy, and `behind` is the URL of the endpoint.
    """

    url: str
    bucket: str
    named: bool
    behind: str = ""

    @property
    def address(self) -> str:
        """URL of the bucket."""
        return f"{self.url}{self.bucket}" if self.url.endswith("//") else f"{self.url}/{self.bucket}"

    @property
    def without_proxy(self) -> Place:
        """Location of the bucket and queues without the proxy of a replay."""
        return Place(self.behind or self.url, self.bucket, self.named)


class Home:
    """Folder of a grid, which is created on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path = path.absolute()
        self.objects = path / "objects"
        self.fleet = path / "fleet"
        self.scratch = path / "scratch"
        self.records = path / "records"
        self.reports = path / "reports"
        """Folder with fetched performance data of jobs in other buckets."""
        self.damaged = path / "damaged"
        """Folder with the damaged objects that `doctor --repair` has removed from the bucket.

        The path of a damaged object in the folder is the key of the object.
        """
        self.queue_file = path / "queue.sqlite"
        self.ledger_file = path / "ledger.sqlite"
        self.settings_file = path / "settings.toml"
        self.notify_file = path / "notify.toml"
        self.sessions_file = path / "sessions.json"
        self.fetched_file = path / "fetched.jsonl"
        self.manager_log = path / "manager.log"
        self.socket_file = path / "manager.sock"
        """Preferred path of the manager's Unix socket. The preferred path may be too long for a socket."""
        self._socket_record = path / "socket.json"
        self._manager_record = path / "manager.json"
        self._manager_lock = path / "manager.lock"
        self._token = path / "token"

    def require_folder(self) -> None:
        """Raise UsageError if the client has only the address of the grid's manager, and not the grid's folder."""

    def backend_folder(self, backend: str) -> Path:
        """Return the path of the folder of one backend in the home.

        A ledger belongs to one bucket, so backends in the same home must not share a ledger.
        """
        return self.path / backend

    def check_backend(self, record: ManagerRecord, wanted: str, remedy: str) -> None:
        """Raise UsageError if the manager in `record` runs on another backend than `wanted`."""
        if record.backend != wanted:
            raise UsageError(f"The grid in {self.path} runs on backend {record.backend}, not {wanted}.", remedy=remedy)

    def place(self, backend: str) -> Place | None:
        """Return the location of the backend's bucket and queues, or None if the grid has never been up.

        If the grid is down, the location is from the last time that the grid was up.
        """
        values = _read(self.backend_folder(backend) / "endpoint.json", Place)
        return Place(**values) if values else None

    def write_place(self, backend: str, place: Place) -> None:
        """Record the location of the bucket and queues atomically."""
        write_whole(self.backend_folder(backend) / "endpoint.json", json.dumps(asdict(place)))

    def forget_place(self, backend: str) -> None:
        """Delete the record of the location of the bucket and queues."""
        (self.backend_folder(backend) / "endpoint.json").unlink(missing_ok=True)

    def make(self) -> None:
        """Create the folder of the grid. Raise UsageError if the home or a folder in it cannot be created or written.

        Without this check of the folders, the grid would start, but all of its workers would fail.
        """
        try:
            for folder in (self.path, self.objects, self.fleet, self.scratch):
                _check(folder)
            make_folder(self.path)
            ignore, marker = self.path / ".gitignore", self.path / object_keys.MADE
            if not ignore.exists():
                ignore.write_text("*\n")
            if not marker.exists():
                marker.touch()
        except OSError as error:
            raise UsageError(
                f"The grid's folder {error.filename or self.path} cannot be written: {error.strerror}.",
                remedy="Name another folder with --home or BATCHLAB_HOME.",
            ) from error

    def tighten(self) -> None:
        """Remove the permissions of other users from the grid's files and folders.

        Earlier releases created the grid's files with the default permissions. The permissions of the home itself
        change only if the home has the default name or contains only files of the grid.
        """
        folders = _FOLDERS | {path.name for path in installation.folder("backends").iterdir()}
        has_other_files = False
        for entry in self.path.iterdir():
            if entry.name in folders or _FILES.fullmatch(entry.name):
                _tighten(entry)
            else:
                has_other_files = True
        if not has_other_files or self.path.name == DEFAULT:
            _tighten(self.path)

    def token(self) -> str:
        """Return the API's bearer token, which is created on first use.

        Only the owner of the grid can read the token. If two processes create the token at the same time, both
        processes use the token of the first process. Raise UsageError if the token cannot be read.
        """
        self.make()
        try:
            if not self._token.exists():
                write_once(self._token, secrets.token_urlsafe(32))
            token = self._token.read_bytes().decode("ascii").strip()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The grid's token {self._token} cannot be read: {getattr(error, 'strerror', 'it is not ASCII text')}.",
                remedy="Only the user who created the grid can use it. If the token is damaged, delete it while the "
                "grid is down.",
            ) from error
        if not token:
            raise UsageError(f"The grid's token {self._token} is empty.", remedy="Delete it while the grid is down.")
        return token

    def store_token(self, token: str) -> None:
        """Store an API token that another program created."""
        self.make()
        if not self._token.exists() or self._token.read_text() != token:
            write_whole(self._token, token)

    def record(self) -> ManagerRecord | None:
        """Return the record of the manager that runs in the home, or None if the home does not have a running manager.

        A new manager counts as running after it has recorded its address.
        """
        values = _read(self._manager_record, ManagerRecord)
        if values is None:
            return None
        record = ManagerRecord(**values)
        try:
            holder = self._manager_lock.read_bytes()
        except FileNotFoundError:
            return None
        # Check the pid, because the record may be the record of a previous manager while a new manager holds the lock.
        # With a previous manager's record, a SIGTERM would be sent to a wrong pid.
        return record if holder == str(record.pid).encode() and self.is_locked else None

    def socket(self, record: ManagerRecord) -> Path | None:
        """Return the path of the Unix socket of the manager in `record`, or None if the socket does not exist."""
        path = self.last_socket(record.owner)
        return path if path and path.exists() else None

    def last_socket(self, owner: str | None = None) -> Path | None:
        """Return the path of the last manager's Unix socket, or None if the last manager did not have a socket.

        With `owner`, return the path only if the name of the last manager is `owner`.
        """
        try:
            values = json.loads(self._socket_record.read_bytes())
            return Path(values["path"]) if owner in (None, values["owner"]) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write_socket(self, owner: str, path: Path) -> None:
        """Record the path of the Unix socket of the manager `owner`."""
        write_whole(self._socket_record, json.dumps({"owner": owner, "path": str(path)}))

    def forget_socket(self) -> None:
        """Delete the record of the manager's Unix socket."""
        self._socket_record.unlink(missing_ok=True)

    def last_owner(self) -> str | None:
        """Return the name under which the last manager in the home held the lease. The last manager may still be
        running.
        """
        values = _read(self._manager_record, ManagerRecord)
        return str(values["owner"]) if values else None

    def write_record(self, record: ManagerRecord) -> None:
        """Write the record of the running manager atomically."""
        write_whole(self._manager_record, json.dumps(asdict(record)))

    @contextmanager
    def lock(self) -> Iterator[Callable[[], bool]]:
        """Hold the lock that allows only one manager in a home. Raise Refused if another manager holds the lock.

        The value is a function that returns whether the folder still contains the locked file. The file is missing
        after the folder was deleted or moved, and another manager can then lock a new file.

        The kernel releases the lock of a process even if the process is killed. A file with a pid would remain after a
        kill.
        """
        self.make()
        with open(self._manager_lock, "a", opener=private) as file:
            self._lock(file)
            self.tighten()
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield partial(self._contains, file)
            # Empty the lock file only after a regular end of the manager. After an error or a kill, the lock file still
            # contains the pid.
            file.truncate(0)

    def _contains(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._manager_lock.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # The file system does not respond, for example after an outage of the network.

    @property
    def is_made(self) -> bool:
        """Whether the folder is the folder of a grid. A process of a deleted grid may create the folder again, but
        only `make` creates the marker. The value is true if the folder cannot be read.
        """
        try:
            (self.path / object_keys.MADE).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            pass  # The folder is in a folder of another user, or its file system does not respond.
        return True

    @property
    def is_taken_down(self) -> bool:
        """Whether the last manager in the home ended without an error and without a kill."""
        try:
            return not self._manager_lock.read_bytes()
        except FileNotFoundError:
            return False

    def _lock(self, file: IO[str]) -> None:
        give_up_s = time.monotonic() + PROBE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                # Try again, because a process that only checks the lock holds the lock for a moment.
                if time.monotonic() > give_up_s:
                    raise Refused(
                        f"A manager is already running in {self.path}.",
                        remedy="`batchlab grid status` shows this manager, and `batchlab grid down` stops it.",
                    ) from error
                time.sleep(0.01)
            else:
                return

    @property
    def is_locked(self) -> bool:
        """Whether a manager is running or starting in the home."""
        try:
            with self._manager_lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def _tighten(path: Path) -> None:
    with suppress(FileNotFoundError):  # Another process has removed the file.
        status = path.lstat()
        is_plain = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
        if is_plain and status.st_uid == os.getuid() and status.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)


def _check(folder: Path) -> None:
    """Raise OSError if the path is not a folder or is not writable."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        # os.access also detects read-only file systems, because os.access calls the kernel.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _read(path: Path, kind: type[ManagerRecord | Place]) -> dict[str, Any] | None:
    """Return the fields of a record, or None if the file is missing or invalid."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    names = {field.name for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING}
    return values if isinstance(values, dict) and required <= values.keys() <= names else None


URL_VARIABLE = "BATCHLAB_URL"
TOKEN_VARIABLE = "BATCHLAB_TOKEN"  # noqa: S105 - the name of the variable


class RemoteHome(Home):
    """Home of a client that has only the URL of a manager and a token, and not the grid's folder.

    The commands of such a client use only the manager's API.
    """

    def __init__(self, path: Path, url: str, token: str) -> None:
        super().__init__(path)
        self.url = url
        self._remote_token = token

    def record(self) -> ManagerRecord | None:
        return ManagerRecord(self.url, 0, "", "")

    def token(self) -> str:
        return self._remote_token

    def socket(self, record: ManagerRecord) -> Path | None:  # noqa: ARG002 - signature of the base class
        return None

    def check_backend(self, record: ManagerRecord, wanted: str, remedy: str) -> None:  # noqa: ARG002
        self.require_folder()

    def make(self) -> None:
        self.require_folder()

    def require_folder(self) -> None:
        raise UsageError(
            f"This command needs the grid's folder, and {URL_VARIABLE} names only the manager of the grid.",
            remedy=f"Name the folder with --home, or unset {URL_VARIABLE}.",
        )


def find_home(option: Path | None) -> Home:
    """Return the home that the option --home names, by default the manager that BATCHLAB_URL names, or else the home
    that BATCHLAB_HOME names, or else `.batchlab` in the current folder. Raise UsageError for an invalid BATCHLAB_URL.
    """
    path = option or Path(os.environ.get("BATCHLAB_HOME") or DEFAULT)
    url, token = os.environ.get(URL_VARIABLE, "").rstrip("/"), os.environ.get(TOKEN_VARIABLE, "").strip()
    if option is not None or not url:
        return Home(path)
    if not re.fullmatch(r"https?://[^/?#@\s]+", url, re.ASCII):
        raise UsageError(f"{URL_VARIABLE} is {url[:200]!r}.", remedy="Write for example http://127.0.0.1:8080.")
    if not (token.isascii() and token.isprintable() and token):
        raise UsageError(
            f"{URL_VARIABLE} names a manager, but {TOKEN_VARIABLE} has no token.",
            remedy="Ask an administrator of the grid for a token, which `batchlab user add` prints.",
        )
    return RemoteHome(path, url, token)


def record_fetch(home: Home, job: str, read_bytes: int) -> None:
    """Append a line with the number of bytes that were read for a job's results to `fetched.jsonl`.

    If the line cannot be written, only log a warning, because the fetched results are complete.
    """
    line = json.dumps({"job": job, "read_bytes": read_bytes}) + "\n"
    try:
        with open(home.fetched_file, "a", encoding="utf-8", opener=private) as file:
            file.write(line)
    except OSError as error:
        log.warning("%s cannot be written: %s", home.fetched_file, error.strerror)


def fetched_bytes(home: Home, job: str) -> int:
    """Return the total number of bytes that all fetches of a job's results have read."""
    return sum(size for name, size in _fetches(home) if name == job)


def last_fetch(home: Home, name: str) -> tuple[str, int] | None:
    """Return the last fetched job with the name `name`, and the number of bytes that the fetch has read."""
    pattern = re.compile(rf"{re.escape(name)}-[0-9a-f]{{10}}")
    fetches = [(job, size) for job, size in _fetches(home) if pattern.fullmatch(job)]
    return fetches[-1] if fetches else None


def _fetches(home: Home) -> Iterator[tuple[str, int]]:
    """Yield the job and the number of bytes of each fetch."""
    with suppress(FileNotFoundError), home.fetched_file.open(encoding="utf-8") as file:
        for line in file:
            try:
                fetch = json.loads(line)
                yield str(fetch["job"]), int(fetch["read_bytes"])
            except (ValueError, KeyError, TypeError):
                log.warning("%s has an invalid line: %r", home.fetched_file, line[:80])


MAX_PATH_BYTES = 100
"""Maximum length of a Unix socket's path in bytes.

The path of a Unix socket may have 103 bytes on macOS and 107 bytes on Linux.
"""
_PREFIX, _NAME = "batchlab-", "manager.sock"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket. With port 0, the socket takes any free port.

    Raise UsageError if the address is in use or does not belong to this machine.

    The socket disables Nagle's algorithm, which delays every response over a reused connection by 40 ms until the
    client's acknowledgement. The module asyncio disables Nagle's algorithm only for sockets with a protocol number, and
    `create_server` does not set a protocol number. Accepted connections inherit the disabled algorithm from the
    listening socket.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0
        # If a host name cannot be resolved, the error has a negative number, which strerror does not support.
        why = os.strerror(number) if number > 0 else str(error).partition(" (")[0]
        raise UsageError(
            f"The server cannot listen on {host}:{port}: {why.rstrip('.')}.",
            remedy="Name another address with --host or --port. Port 0 takes any free port.",
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def listen_locally(home: Home) -> tuple[socket.socket, Path] | None:
    """Return a listening Unix socket that only the current user can open, and the path of the socket.

    Return None if the file systems of this machine do not allow a Unix socket. The caller must hold the lock of the
    grid's manager.
    """
    for path in _candidates(home):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            listener.bind(os.fspath(path))
            # The socket refuses connections until listen() is called, so the permissions apply to every connection.
            path.chmod(0o600)
            listener.listen()
        except OSError as error:
            listener.close()
            log.info("no Unix socket at %s: %s", path, error)
        else:
            return listener, path
    home.forget_socket()
    log.warning("the manager has no Unix socket, so clients on this machine use its port")
    return None


def remove_socket(home: Home) -> None:
    """Remove the Unix socket of a manager that ends, and the record of the socket."""
    if last := home.last_socket():
        last.unlink(missing_ok=True)
        if _is_fallback(last):
            with suppress(OSError):  # The folder contains files of another program.
                last.parent.rmdir()
    home.forget_socket()


def _candidates(home: Home) -> Iterator[Path]:
    if len(os.fsencode(home.socket_file)) <= MAX_PATH_BYTES:
        yield home.socket_file
    # Try the socket path of the previous manager first, because clients wait for the next manager at this path.
    if (last := home.last_socket()) and _is_fallback(last):
        yield last
    import tempfile

    for folder in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if folder and len(os.fsencode(folder)) < MAX_PATH_BYTES - len(_PREFIX) - 25:
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder)) / _NAME


def _is_fallback(path: Path) -> bool:
    """Return whether the socket is in a private folder that batchlab created for the socket."""
    try:
        status = path.parent.lstat()
    except OSError:
        return False
    is_private = status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077
    has_name = path.name == _NAME and path.parent.name.startswith(_PREFIX)
    return stat.S_ISDIR(status.st_mode) and is_private and has_name
