"""Fixtures that start emulators of S3 and SQS, and return their endpoints.

Each pytest worker starts its own emulator once, and ends it. If an emulator is not installed, its
tests are skipped on a laptop and fail in CI.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.local.ministack import Emulator, find, install
from batchlab.core import installation

EMULATORS = ("ministack", "localstack", "moto")
"""The names of the fixtures, which are also the names of the emulators."""

LOCALSTACK_PYTHON = "BATCHLAB_LOCALSTACK_PYTHON"
"""Environment variable with the path of the Python that localstack-core is installed for."""

LOCALSTACK = {
    "SERVICES": "s3,sqs",
    "EAGER_SERVICE_LOADING": "1",
    "SQS_ENDPOINT_STRATEGY": "off",
    "SQS_DISABLE_CLOUDWATCH_METRICS": "1",
    "DISABLE_EVENTS": "1",
    "SKIP_SSL_CERT_DOWNLOAD": "1",
}
"""Environment variables of every LocalStack that the tests start."""

START_S = 90.0

_LIBC = ctypes.CDLL(None, use_errno=True)


class Server:
    """An emulator's process on its own port. A test may call `start` and `kill` repeatedly."""

    def __init__(
        self, command: Sequence[str], folder: Path, *, port: int, env: Mapping[str, str] = {}, host: str = "127.0.0.1"
    ) -> None:
        self.endpoint = Endpoint(f"http://{host}:{port}")
        self._command = command
        self._log = folder / "server.log"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        # The emulator must not inherit the user's AWS_* variables.
        self._env = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "TMPDIR": str(folder / "tmp"), **env}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the emulator, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        deadline_s = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.kill()
                pytest.fail(f"did not start: {self.log()[-2000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        assert self.endpoint.url is not None
        try:
            with urllib.request.urlopen(self.endpoint.url, timeout=5):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            return False

    def log(self) -> str:
        """Return the output of the emulator."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill the emulator with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def end_with_parent() -> None:
    """End this process when its parent ends. A killed test run does not finish its fixtures and would leave its servers
    running."""
    pr_set_pdeathsig = 1
    if _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")


def free_port() -> int:
    """Return a port of 127.0.0.1 on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def moto_server(folder: Path) -> Server:
    """Return a moto server from the development environment, without starting it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    return Server(command, folder, port=port)


def localstack_server(python: str, folder: Path, *, env: Mapping[str, str] = {}) -> Server:
    """Return a LocalStack server from the environment of that Python, without starting it."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    env = {**LOCALSTACK, "GATEWAY_LISTEN": address, "LOCALSTACK_HOST": address, **env}
    return Server([python, "-m", "localstack.runtime.main"], folder, port=port, env=env)


def lasting_localstack(python: str, folder: Path) -> Server:
    """Return a LocalStack server that stores its state in `folder` as the grid's own LocalStack does."""
    scripts = folder / "root/etc/localstack/init/start.d"
    scripts.mkdir(parents=True)
    (scripts / "keep_state.py").symlink_to(installation.folder("compose") / "localstack" / "keep_state.py")
    # CI creates LocalStack's index of AWS's services once. Without the index, a start takes four times the CPU time.
    index = Path(python).parents[1] / "filesystem/usr/lib/localstack"
    if index.is_dir():
        (folder / "root/usr/lib").mkdir(parents=True)
        (folder / "root/usr/lib/localstack").symlink_to(index)
    root = {"OVERRIDE_IN_DOCKER": "0", "FILESYSTEM_ROOT": str(folder / "root")}
    return localstack_server(python, folder, env={**root, "BATCHLAB_LOCALSTACK_STATE": str(folder / "state")})


def ministack_python() -> Path:
    """Return the Python that MiniStack is installed for. If MiniStack is not installed, skip the test, or fail in
    CI."""
    if found := find():
        return found
    if os.environ.get("CI"):
        return install(print)
    pytest.skip("MiniStack is not installed")


def named_emulator(folder: Path, *, port: int = 0) -> Emulator:
    """Return MiniStack for a grid that names its endpoint and therefore signs with the default keys."""
    known = Endpoint()
    keys = {"access_key": known.access_key, "secret_key": known.secret_key}
    folder.mkdir(exist_ok=True)
    (folder / "keys.json").write_text(json.dumps(keys))
    return Emulator(ministack_python(), folder, port=port)


def localstack_python() -> str:
    """Return the Python that LocalStack is installed for. If LocalStack is not installed, skip the test, or fail
    in CI."""
    if python := os.environ.get(LOCALSTACK_PYTHON):
        return python
    if os.environ.get("CI"):
        pytest.fail(f"CI promises LocalStack, but {LOCALSTACK_PYTHON} is not set")
    pytest.skip(f"{LOCALSTACK_PYTHON} names no Python with LocalStack")


def _served(server: Server) -> Iterator[Endpoint]:
    try:
        server.start()
        yield server.endpoint
    finally:
        server.kill()


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Start MiniStack as the backend `ministack` does, with the keys of a named endpoint."""
    with named_emulator(tmp_path_factory.mktemp("ministack")) as emulator:
        yield emulator.endpoint


@pytest.fixture(scope="session")
def localstack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Start LocalStack 4.14 as the backend `localstack` does, with a stored state."""
    folder = tmp_path_factory.mktemp("localstack")
    yield from _served(lasting_localstack(localstack_python(), folder))


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Start moto's server."""
    yield from _served(moto_server(tmp_path_factory.mktemp("moto")))
