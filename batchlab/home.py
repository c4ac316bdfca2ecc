"""The one folder that a local grid lives in, and who is at home.

Invariant: everything in it survives SIGKILL and can be looked at with `ls`.

    objects/        the bucket           queue.sqlite    the queues
    ledger.sqlite   the ledger           fleet/          instance records, logs, group state
    manager.json    the running manager  manager.lock    held while it runs
    token           the API's bearer token (0600)
    scratch/        the workers' unpacked code and task folders
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from batchlab.errors import Refused, UsageError
from batchlab.protocol import naming

DEFAULT = ".batchlab"
PROBED_S = 0.2
"""For longer than this nobody holds the lock only to see whether it is taken."""


@dataclass(frozen=True, slots=True)
class ManagerRecord:
    """A running manager: where its API listens, and its name as owner of the lease."""

    url: str
    pid: int
    owner: str
    backend: str


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
    def manager_log(self) -> Path:
        return self.path / "manager.log"

    def make(self) -> None:
        """Make the folder; UsageError where that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ignore = self.path / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")
            (self.path / naming.MADE).touch()
        except OSError as error:
            raise UsageError(
                f"The grid's folder {self.path} cannot be written: {error.strerror}.",
                remedy="Name another with --home or BATCHLAB_HOME.",
            ) from error

    def token(self) -> str:
        """The API's bearer token, made on first use and readable by its owner only."""
        path = self.path / "token"
        self.make()
        try:
            # Exclusive creation with the mode set at once: never readable by others, not even
            # for a moment, and two processes agree on one token.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32))
        return path.read_text().strip()

    def record(self) -> ManagerRecord | None:
        """The manager that runs here; None where there is none (its lock is free), and while one
        that has only just started has not said yet where it listens."""
        try:
            record = ManagerRecord(**json.loads((self.path / "manager.json").read_text()))
            holder = (self.path / "manager.lock").read_text()
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        # Else the next manager's lock would vouch for the record of the one before it, and a
        # SIGTERM go to a process that is long gone.
        return record if holder == str(record.pid) and self._is_locked() else None

    def last_owner(self) -> str | None:
        """The lease owner of the manager that ran here last, alive or not."""
        try:
            doc = json.loads((self.path / "manager.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return str(doc["owner"])

    def write_record(self, record: ManagerRecord) -> None:
        """Say who is at home; whole or not at all."""
        staged = self.path / "manager.json.new"
        staged.write_text(json.dumps(asdict(record)))
        staged.replace(self.path / "manager.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only manager here; Refused while another is. The kernel frees the lock of a
        process however it died, which a pid in a file cannot promise."""
        self.make()
        with (self.path / "manager.lock").open("a") as file:
            self._lock(file)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

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

    def _is_locked(self) -> bool:
        try:
            with (self.path / "manager.lock").open("a") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


def find_home(option: Path | None) -> Home:
    """The folder named by the option, by BATCHLAB_HOME, or `.batchlab` here."""
    return Home(option or Path(os.environ.get("BATCHLAB_HOME") or DEFAULT))
