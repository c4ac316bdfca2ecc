"""A PostgreSQL server for tests, with its data in a temporary folder.

Each pytest worker starts its own server once, and ends it. Each test has its own schema. If
PostgreSQL is not installed, its tests are skipped on a laptop and fail in CI.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.aws.emulators import end_with_parent, free_port

BIN = "BATCHLAB_POSTGRES_BIN"
"""Environment variable: the folder of initdb and postgres, where they are not where Debian, Red Hat
or Homebrew put them."""

PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")
START_S = 60.0
USER, PASSWORD = "grid", "p@ss/w:rd %41"
DATABASE = "ledgers"
_SETTINGS = {
    # What is lost when the machine stops is lost: it is a test.
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "logging_collector": "off",
    "log_statement": "none",
}


class PostgresServer:
    """A server's process; `start` and `stop` as often as a test likes, on one port and folder."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        """`binaries` are of PostgreSQL 15 or newer."""
        self.port = free_port()
        self.folder = folder
        self._binaries = binaries
        self._process: subprocess.Popen[bytes] | None = None
        # It refuses to run as root.
        self._as: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            # Changing the user forgets that it is to end with us.
            become = ["--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=KILL"]
            self._as = ["setpriv", *become]

    def make(self) -> None:
        """Make the cluster and the database; it runs afterwards."""
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._run(
            "initdb",
            "--no-sync",
            "--no-instructions",
            "--encoding=UTF8",
            "--locale=C",
            "--auth=scram-sha-256",
            f"--username={USER}",
            f"--pwfile={secret}",
            "-D",
            str(self.folder / "data"),
        )
        self.start()
        # Sorted as a dictionary sorts: what must not depend on that says so itself.
        sorts = "LOCALE_PROVIDER icu ICU_LOCALE 'en'"
        self.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0 {sorts}", database="postgres")

    def _run(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [*self._as, str(self._binaries / program), *args], cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            pytest.fail(f"{program}: {done.stderr[-2000:]}")

    def start(self, **more: str) -> None:
        """Returns when it answers; `more` are settings."""
        settings = {**_SETTINGS, "port": self.port, **more}
        options = [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as, str(self._binaries / "postgres"), "-D", "data", *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        deadline_s = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                log_text = (self.folder / "server.log").read_text(errors="replace")
                pytest.fail(f"PostgreSQL did not start: {log_text[-2000:]}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            self.connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: sessions are ended, its state is kept. SIGQUIT: as if the power went."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=60)
            self._process = None

    @property
    def pids(self) -> list[int]:
        """The server's processes, the first one first."""
        assert self._process is not None
        first = self._process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text()
        return [first, *map(int, children.split())]

    def url(self, *, port: int | None = None, password: str = PASSWORD, **query: str) -> str:
        """As a user would write it."""
        quoted = "".join(c if c.isalnum() else f"%{ord(c):02X}" for c in password)
        options = "&".join(f"{name}={value}" for name, value in query.items())
        where = f"127.0.0.1:{port or self.port}/{DATABASE}"
        return f"postgresql://{USER}:{quoted}@{where}{'?' if options else ''}{options}"

    def connect(self, database: str = DATABASE) -> psycopg.Connection[Any]:
        """A connection of the test's own, which commits each statement."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            connect_timeout=5,
            autocommit=True,
        )

    def execute(self, statement: str, *, database: str = DATABASE) -> list[tuple[Any, ...]]:
        """Rows of one statement, where it has any."""
        with closing(self.connect(database)) as connection:
            # The statements are the tests' own.
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def sessions(self) -> int:
        """How many there are of batchlab."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'batchlab'"
        ((count,),) = self.execute(query)
        return int(count)

    def end_sessions(self) -> int:
        """End those of batchlab, as an administrator would, and see them gone; how many."""
        query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'batchlab'"
        return len(self.execute(query))


@dataclass(frozen=True)
class Postgres:
    """A place for one ledger: a server and a schema that nobody else uses."""

    server: PostgresServer
    schema: str

    @property
    def url(self) -> str:
        return self.server.url()


def _binaries() -> Path:
    """Where initdb and postgres are; skips or fails where they are not."""
    if named := os.environ.get(BIN):
        return Path(named)
    found = [p for place in PLACES for p in Path("/").glob(place[1:]) if (p / "initdb").exists()]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    if found:
        return max(found, key=lambda p: [int(n) for n in p.parent.name.split(".") if n.isdigit()])
    if os.environ.get("CI"):
        pytest.fail(f"CI promises PostgreSQL, but it is not installed and {BIN} is not set")
    pytest.skip("PostgreSQL is not installed")


def served() -> Iterator[PostgresServer]:
    """A fresh server, gone afterwards with all its files."""
    binaries = _binaries()
    # Not in pytest's folder, which the server's user may not enter.
    folder = Path(tempfile.mkdtemp(prefix="batchlab-postgres-"))
    server = PostgresServer(binaries, folder)
    try:
        server.make()
        yield server
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests of a worker that do it no harm."""
    yield from served()


@pytest.fixture
def frail_server() -> Iterator[PostgresServer]:
    """A server that the test may stop and pause."""
    yield from served()


_numbers = itertools.count(1)


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[Postgres]:
    """A schema that is not there yet, and is not there afterwards."""
    place = Postgres(postgres_server, f"grid-{next(_numbers)}")
    yield place
    postgres_server.execute(f'DROP SCHEMA IF EXISTS "{place.schema}" CASCADE')
