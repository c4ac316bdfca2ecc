"""The one folder that a local grid lives in, and who is at home.

Invariant: everything in it survives SIGKILL and can be looked at with `ls`.

    objects/        the bucket           queue.sqlite    the queues
    ledger.sqlite   the ledger           fleet/          instance records, logs, group state
    manager.json    the running manager  manager.lock    held while it runs
    manager.sock    its Unix socket (0600), and socket.json, where that is
    token           the API's bearer token (0600)
    scratch/        the workers' unpacked code and task folders
    damaged/        objects that `doctor --repair` has moved away
    settings.toml   what the manager is told in place of what its backend says; optional
    notify.toml     whom the grid notifies of its jobs; optional
    fetched.jsonl   how much was read for results that were fetched to here
    sessions.json   who has logged out of the web page before their time
    open-*.html     leads a browser to the page (0600), while `grid open` waits for it
    records/        what replays of scenarios have measured
    ministack/      that backend's endpoint.json, ledger.sqlite, and its emulator's own state
    gcs/            that backend's endpoint.json, ledger.sqlite, and queue.sqlite
    localstack/     that backend's endpoint.json, where its containers are, and what they have said
    aws/            where the parts of a stack on AWS are, for who works with one from here

What has been fetched from a grid's bucket to a home: `fetched.jsonl`, a line for each fetch.

Invariant: lines are only ever added, each by one write, so fetches at the same time lose none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import IO, Any

from batchlab.core import package_data
from batchlab.core.atomic_write import make_folder, private, sync_folder, write_whole
from batchlab.core.errors import Refused, UsageError
from batchlab.core.protocol import object_keys

DEFAULT = ".batchlab"

_FOLDERS = frozenset({"objects", "fleet", "scratch", "wake", "records", "reports", "damaged"})
_FILES = re.compile(
    r"\.gitignore|\.batchlab-made|token|manager\.(json|lock|log|sock)|(ledger|queue)\.sqlite.*"
    r"|(settings|notify|prices)\.toml|fetched\.jsonl|sessions\.json|open-.*\.html"
)
"""Names of the grid's own in its folder, whatever else the user keeps there."""
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
PROBED_S = 0.2
"""For longer than this nobody holds the lock only to see whether it is taken."""


@dataclass(frozen=True, slots=True)
class ManagerRecord:
    """A running manager: where its API listens, and its name as owner of the lease. It ends with
    the process `parent`, if that is not 0."""

    url: str
    pid: int
    owner: str
    backend: str
    parent: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a grid's bucket and queues are: at the endpoint `url`, in `bucket`. `named` by the
    user, or else in an emulator of the grid's own. While a replay's front stands at `url`, the
    endpoint itself is `behind` that."""

    url: str
    bucket: str
    named: bool
    behind: str = ""

    @property
    def address(self) -> str:
        """The URL of the bucket."""
        return (
            f"{self.url}{self.bucket}" if self.url.endswith("//") else f"{self.url}/{self.bucket}"
        )

    @property
    def unfronted(self) -> Place:
        """The same without a front."""
        return Place(self.behind or self.url, self.bucket, self.named)


class Home:
    """A grid's folder; made on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def objects(self) -> Path:
        return self.path / "objects"

    @property
    def queue_file(self) -> Path:
        return self.path / "queue.sqlite"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def fleet(self) -> Path:
        return self.path / "fleet"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def reports(self) -> Path:
        """Performance data of jobs whose bucket is not here, as it was fetched."""
        return self.path / "reports"

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.toml"

    @property
    def notify_file(self) -> Path:
        return self.path / "notify.toml"

    @property
    def sessions_file(self) -> Path:
        return self.path / "sessions.json"

    @property
    def fetched_file(self) -> Path:
        return self.path / "fetched.jsonl"

    @property
    def records(self) -> Path:
        return self.path / "records"

    @property
    def manager_log(self) -> Path:
        return self.path / "manager.log"

    @property
    def damaged(self) -> Path:
        """Damaged objects that `doctor --repair` has moved away, by their keys."""
        return self.path / "damaged"

    def of(self, backend: str) -> Path:
        """What is one backend's alone. A ledger is of one bucket, so backends that share this
        folder must not share it."""
        return self.path / backend

    def check_backend(self, record: ManagerRecord, wanted: str, remedy: str) -> None:
        """UsageError where who is at home runs on another backend."""
        if record.backend != wanted:
            raise UsageError(
                f"The grid in {self.path} runs on backend {record.backend}, not {wanted}.",
                remedy=remedy,
            )

    def place(self, backend: str) -> Place | None:
        """Where this backend's bucket and queues are, or were when the grid was last up; None
        where it has never been up."""
        fields = _read(self.of(backend) / "endpoint.json", Place)
        return Place(**fields) if fields else None

    def write_place(self, backend: str, place: Place) -> None:
        """Say where they are; whole or not at all."""
        write_whole(self.of(backend) / "endpoint.json", json.dumps(asdict(place)))

    def forget_place(self, backend: str) -> None:
        """There is no such place any more."""
        (self.of(backend) / "endpoint.json").unlink(missing_ok=True)

    def make(self) -> None:
        """Make the folder; UsageError where that is not possible, or what is in it could not be
        written: found out later, by the workers, it would only be a grid that does nothing."""
        try:
            for folder in (self.path, self.objects, self.fleet, self.scratch):
                _check(folder)
            make_folder(self.path)
            ignore, made = self.path / ".gitignore", self.path / object_keys.MADE
            if not ignore.exists():
                ignore.write_text("*\n")
            if not made.exists():
                made.touch()
        except OSError as error:
            raise UsageError(
                f"The grid's folder {error.filename or self.path} cannot be written: "
                f"{error.strerror}.",
                remedy="Name another with --home or BATCHLAB_HOME.",
            ) from error

    def tighten(self) -> None:
        """Let only their user read the grid's files and folders, which earlier releases made with
        the usual permissions. The folder itself may hold other things of the user's: it is left
        as it is unless everything in it is the grid's."""
        ours = _FOLDERS | {one.name for one in package_data.folder("backends").iterdir()}
        is_ours = True
        for entry in self.path.iterdir():
            if entry.name in ours or _FILES.fullmatch(entry.name):
                _tighten(entry)
            else:
                is_ours = False
        if is_ours or self.path.name == DEFAULT:
            _tighten(self.path)

    def token(self) -> str:
        """The API's bearer token, made on first use and readable by its owner only; UsageError
        where it cannot be read."""
        path = self.path / "token"
        self.make()
        try:
            if not path.exists():
                _make_token(path)
            found = path.read_bytes().decode("ascii").strip()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The grid's token {path} cannot be read: {getattr(error, 'strerror', 'no text')}.",
                remedy="Only who has made the grid can use it; a damaged token may be deleted "
                "while the grid is down.",
            ) from error
        if not found:
            raise UsageError(
                f"The grid's token {path} is empty.", remedy="Delete it while the grid is down."
            )
        return found

    def keep_token(self, token: str) -> None:
        """Have this token from now on, which somebody else has made."""
        self.make()
        path = self.path / "token"
        if path.exists() and path.read_text() == token:
            return
        write_whole(path, token)

    def record(self) -> ManagerRecord | None:
        """The manager that runs here; None where there is none (its lock is free), and while one
        that has only just started has not said yet where it listens."""
        fields = _read(self.path / "manager.json", ManagerRecord)
        if fields is None:
            return None
        record = ManagerRecord(**fields)
        try:
            holder = (self.path / "manager.lock").read_bytes()
        except FileNotFoundError:
            return None
        # Else the next manager's lock would vouch for the record of the one before it, and a
        # SIGTERM go to a process that is long gone.
        return record if holder == str(record.pid).encode() and self.is_locked else None

    @property
    def socket_file(self) -> Path:
        """Where the manager's Unix socket is, unless that path is too long for a socket."""
        return self.path / "manager.sock"

    def socket(self, record: ManagerRecord) -> Path | None:
        """Return the Unix socket of that manager, or None if it has none."""
        try:
            found = json.loads(self._socket_record.read_bytes())
            owner, path = found["owner"], Path(found["path"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return path if owner == record.owner and path.exists() else None

    def last_socket(self) -> Path | None:
        """Return where the Unix socket of the last manager was, or None if there was none."""
        try:
            return Path(json.loads(self._socket_record.read_bytes())["path"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write_socket(self, owner: str, path: Path) -> None:
        """Record the Unix socket of the manager with that name."""
        write_whole(self._socket_record, json.dumps({"owner": owner, "path": str(path)}))

    def forget_socket(self) -> None:
        """Delete the record of the Unix socket."""
        self._socket_record.unlink(missing_ok=True)

    @property
    def _socket_record(self) -> Path:
        return self.path / "socket.json"

    def last_owner(self) -> str | None:
        """The lease owner of the manager that ran here last, alive or not."""
        fields = _read(self.path / "manager.json", ManagerRecord)
        return str(fields["owner"]) if fields else None

    def write_record(self, record: ManagerRecord) -> None:
        """Say who is at home; whole or not at all."""
        write_whole(self.path / "manager.json", json.dumps(asdict(record)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only manager here; Refused while another is. The kernel frees the lock of a
        process however it died, which a pid in a file cannot promise."""
        self.make()
        with open(self.path / "manager.lock", "a", opener=private) as file:
            self._lock(file)
            self.tighten()
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
            # Not after an error, nor after a kill: what ended so was not taken down.
            file.truncate(0)

    @property
    def is_taken_down(self) -> bool:
        """Whether the last manager here ended because somebody ended it."""
        try:
            return not (self.path / "manager.lock").read_bytes()
        except FileNotFoundError:
            return False

    def _lock(self, file: IO[str]) -> None:
        give_up_s = time.monotonic() + PROBED_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                # Whoever asks whether it is locked holds it for a moment.
                if time.monotonic() > give_up_s:
                    raise Refused(
                        f"A manager runs in {self.path} already.",
                        remedy="`batchlab grid status` shows it, `batchlab grid down` ends it.",
                    ) from error
                time.sleep(0.01)
            else:
                return

    @property
    def is_locked(self) -> bool:
        """Whether a manager runs or starts here."""
        try:
            with (self.path / "manager.lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def _tighten(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return  # another process has removed it
    is_plain = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    if is_plain and found.st_uid == os.getuid() and found.st_mode & _OTHERS:
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)


def _check(folder: Path) -> None:
    """OSError where there is something that is no folder, or none that can be written."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        # Asked of the kernel, which also knows of file systems that are read-only.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _make_token(path: Path) -> None:
    """Never readable by others, not even for a moment; whole or not at all; and two processes
    agree on one token."""
    staged = _private(path, secrets.token_urlsafe(32))
    try:
        with suppress(FileExistsError):  # another process was faster, and its token counts
            path.hardlink_to(staged)
    finally:
        staged.unlink()
    sync_folder(path.parent)


def _private(path: Path, text: str) -> Path:
    """A file beside `path` with the text, which nobody else can read at any moment."""
    staged = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    return staged


def _read(path: Path, kind: type[ManagerRecord | Place]) -> dict[str, Any] | None:
    """The fields of the one that was written; None where there is no such file, or it holds another
    thing: then nobody is at home."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    names = {field.name for field in fields_of(kind)}
    needed = {field.name for field in fields_of(kind) if field.default is MISSING}
    return found if isinstance(found, dict) and needed <= found.keys() <= names else None


def find_home(option: Path | None) -> Home:
    """The folder named by the option, by BATCHLAB_HOME, or `.batchlab` here."""
    return Home(option or Path(os.environ.get("BATCHLAB_HOME") or DEFAULT))


log = logging.getLogger(__name__)


def note(home: Home, job: str, read_bytes: int) -> None:
    """Remember that so many bytes were read for the job's results; a line that cannot be written is
    logged, since the results are there all the same."""
    line = json.dumps({"job": job, "read_bytes": read_bytes}) + "\n"
    try:
        with open(home.fetched_file, "a", encoding="utf-8", opener=private) as file:
            file.write(line)
    except OSError as error:
        log.warning("%s cannot be written: %s", home.fetched_file, error.strerror)


def total_bytes(home: Home, job: str) -> int:
    """What was read for a job's results so far, however often."""
    return sum(size for name, size in _lines(home) if name == job)


def last_of(home: Home, name: str) -> tuple[str, int] | None:
    """The job of that name whose results were fetched last, and what was read for them then."""
    mine = re.compile(rf"{re.escape(name)}-[0-9a-f]{{10}}")
    found = None
    for job, size in _lines(home):
        if mine.fullmatch(job):
            found = job, size
    return found


def _lines(home: Home) -> Iterator[tuple[str, int]]:
    try:
        with home.fetched_file.open(encoding="utf-8") as file:
            for line in file:
                try:
                    fields = json.loads(line)
                    yield str(fields["job"]), int(fields["read_bytes"])
                except (ValueError, KeyError, TypeError):
                    log.warning("%s has a line that is none: %r", home.fetched_file, line[:80])
    except FileNotFoundError:
        return
