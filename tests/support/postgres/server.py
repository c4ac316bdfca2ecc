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
"""Environment variable with the folder of initdb and postgres, for installations outside the paths of Debian, Red Hat,
and Homebrew."""

PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")
START_S = 60.0
USER, PASSWORD = "grid", "p@ss/w:rd %41"
DATABASE = "ledgers"
_SETTINGS = {
    # The data of a test need not survive a crash of the machine.
    "fsync": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # Each test has its own small schema, so statistics are not worth their CPU time.
    "autovacuum": "off",
    "jit": "off",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "logging_collector": "off",
    "log_statement": "none",
}


class PostgresServer:
    """A server's process on one port and folder. A test may call `start` and `stop` repeatedly."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        """`binaries` is the folder of PostgreSQL 15 or newer."""
        self.port = free_port()
        self.folder = folder
        self._binaries = binaries
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL does not run as root.
        self._as: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            # A change of the user clears the setting that ends this process with its parent.
            become = ["--reuid=postgres", "--regid=postgres", "--init-groups", "--pdeathsig=KILL"]
            self._as = ["setpriv", *become]

    def make(self) -> None:
        """Create the cluster and the database, and leave the server running."""
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
        # The database sorts text as a dictionary does. A query that needs another order must set its collation.
        sorts = "LOCALE_PROVIDER icu ICU_LOCALE 'en'"
        self.execute(f"CREATE DATABASE {DATABASE} TEMPLATE template0 {sorts}", database="postgres")

    def _run(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [*self._as, str(self._binaries / program), *args], cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            pytest.fail(f"{program}: {done.stderr[-2000:]}")

    def start(self, **more: str) -> None:
        """Start the server with the settings in `more`, and wait until it answers."""
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
        """Stop the server. SIGINT ends the sessions and keeps the data. SIGQUIT simulates a power loss."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(timeout=60)
            self._process = None

    @property
    def pids(self) -> list[int]:
        """Return the pids of the server's processes, the main process first."""
        assert self._process is not None
        first = self._process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text()
        return [first, *map(int, children.split())]

    def url(self, *, port: int | None = None, password: str = PASSWORD, **query: str) -> str:
        """Return the server's URL as a user writes it."""
        quoted = "".join(c if c.isalnum() else f"%{ord(c):02X}" for c in password)
        options = "&".join(f"{name}={value}" for name, value in query.items())
        where = f"127.0.0.1:{port or self.port}/{DATABASE}"
        return f"postgresql://{USER}:{quoted}@{where}{'?' if options else ''}{options}"

    def connect(self, database: str = DATABASE) -> psycopg.Connection[Any]:
        """Open a connection for the test, which commits each statement."""
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
        """Run one statement, and return its rows."""
        with closing(self.connect(database)) as connection:
            # The tests write all of these statements, so injection is not possible.
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def sessions(self) -> int:
        """Return the number of batchlab's sessions."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'batchlab'"
        ((count,),) = self.execute(query)
        return int(count)

    def end_sessions(self) -> int:
        """End batchlab's sessions as an administrator would, wait until they are closed, and return their number."""
        query = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name = 'batchlab'"
        return len(self.execute(query))


@dataclass(frozen=True)
class Postgres:
    """A place for one ledger: a server and a schema that no other test uses."""

    server: PostgresServer
    schema: str

    @property
    def url(self) -> str:
        return self.server.url()


def _binaries() -> Path:
    """Return the folder of initdb and postgres. If it does not exist, skip the test, or fail in CI."""
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
    """Create a fresh server, and remove it and its files on exit."""
    binaries = _binaries()
    # The server's user cannot read pytest's temporary folder.
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
    """Start one server per pytest worker for all tests that do not damage the server."""
    yield from served()


@pytest.fixture
def frail_server() -> Iterator[PostgresServer]:
    """Start a server that the test may stop and pause."""
    yield from served()


_numbers = itertools.count(1)


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[Postgres]:
    """Yield an unused schema name, and drop the schema afterwards."""
    place = Postgres(postgres_server, f"grid-{next(_numbers)}")
    yield place
    postgres_server.execute(f'DROP SCHEMA IF EXISTS "{place.schema}" CASCADE')
