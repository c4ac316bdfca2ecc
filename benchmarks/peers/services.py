"""Brokers and databases of the peers, which run in new processes with empty data and stop after the run.

Redis keeps its data in memory only. PostgreSQL flushes each commit to the disk, which is its default.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

from benchmarks.peers import processes

START_S = 60.0


@dataclass(frozen=True)
class Service:
    """A running service: its address and its first process."""

    url: str
    pid: int


Started = Mapping[str, Service]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def child(
    command: Sequence[str],
    folder: Path,
    is_ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
    how: Signals = SIGTERM,
) -> Iterator[int]:
    """Run a service until the end of the context, and yield its pid when `is_ready` returns true."""
    log = folder / "service.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield process.pid
    finally:
        processes.stop([process], how)


def _accepts(address: str | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        return client.connect_ex(address) == 0


@contextmanager
def redis(folder: Path, started: Started, venvs: Path) -> Iterator[Service]:
    """Run Redis without persistence."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with child(command, folder, lambda: _accepts(("127.0.0.1", port))) as pid:
        yield Service(f"redis://127.0.0.1:{port}/0", pid)


def _prepare(command: Sequence[str], folder: Path) -> None:
    """Run a command that prepares a service."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def _postgres_programs() -> Path | None:
    """Return the folder of the newest PostgreSQL."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    return max(found, key=lambda path: [int(n) for n in path.parent.name.split(".") if n.isdigit()], default=None)


@contextmanager
def postgres(folder: Path, started: Started, venvs: Path) -> Iterator[Service]:
    """Run PostgreSQL on a Unix socket in the private folder `folder`."""
    programs, become = _postgres_programs(), list[str]()
    assert programs is not None
    if os.geteuid() == 0:  # PostgreSQL does not run as root.
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    make = [*become, str(programs / "initdb"), "--auth=trust", "--username=postgres", "--encoding=UTF8", "-D", "data"]
    _prepare(make, folder)
    command = [*become, str(programs / "postgres"), "-D", "data"]
    settings = {"listen_addresses": "", "unix_socket_directories": str(folder), "port": "5432"}
    settings |= {"shared_buffers": "256MB", "max_wal_size": "2GB", "max_connections": "200"}
    command += [f"--{name}={value}" for name, value in settings.items()]
    with child(command, folder, lambda: _accepts(str(folder / ".s.PGSQL.5432")), how=SIGINT) as pid:
        yield Service(f"postgresql://postgres@/postgres?host={folder}", pid)


@contextmanager
def dbos(folder: Path, started: Started, venvs: Path) -> Iterator[Service]:
    """Run another PostgreSQL, with the tables of DBOS."""
    with postgres(folder, started, venvs) as service:
        migrate = [str(venvs / "dbos" / "bin" / "dbos"), "migrate", "--sys-db-url", service.url]
        _prepare(migrate, folder)
        yield service


@contextmanager
def prefect(folder: Path, started: Started, venvs: Path) -> Iterator[Service]:
    """Run the server of Prefect on PostgreSQL, without its web page and its telemetry."""
    port = free_port()
    environment = {
        "PREFECT_API_DATABASE_CONNECTION_URL": started["postgres"].url.replace("://", "+asyncpg://"),
        "PREFECT_HOME": str(folder),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    command = [
        str(venvs / "prefect" / "bin" / "prefect"),
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with child(command, folder, lambda: _accepts(("127.0.0.1", port)), environment) as pid:
        yield Service(f"http://127.0.0.1:{port}/api", pid)


@contextmanager
def aws(folder: Path, started: Started, venvs: Path) -> Iterator[Service]:
    """Run MiniStack, an emulator of S3 and SQS, with the keys that all peers use."""
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local import state_files
    from batchlab.adapters.local.ministack import Emulator
    from batchlab.adapters.local.ministack import install as install_ministack

    known = Endpoint()
    keys = {"access_key": known.access_key, "secret_key": known.secret_key}
    (folder / state_files.KEYS_FILE).write_text(json.dumps(keys))
    with Emulator(install_ministack(print), folder) as running:
        yield Service(running.url, running.pid)


SERVICES: Mapping[str, Callable[[Path, Started, Path], AbstractContextManager[Service]]] = {
    "redis": redis,
    "postgres": postgres,
    "dbos": dbos,
    "prefect": prefect,
    "aws": aws,
}
"""Services in the order of their start."""


def lacking(name: str) -> str | None:
    """Return what the machine lacks for the service or the program `name`, with the Debian package that has it."""
    if name in ("postgres", "dbos"):
        return None if _postgres_programs() else "PostgreSQL (Debian package postgresql)"
    program = {"redis": "redis-server", "aws": "", "prefect": ""}.get(name, name)
    if program and not shutil.which(program):
        return f"the program {program} (Debian package {program})"
    return None


@contextmanager
def running(names: set[str], venvs: Path) -> Iterator[Started]:
    """Start the services `names`, and stop them at the end of the context."""
    started: dict[str, Service] = {}
    with ExitStack() as stack:
        for name in (one for one in SERVICES if one in names):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"batchlab-peers-{name}-"))
            started[name] = stack.enter_context(SERVICES[name](Path(folder), started, venvs))
        yield started
