"""Local instances that the manager forks from one process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from batchlab import Grid
from batchlab.adapters.local.fork_server import ForkServer
from batchlab.adapters.local.processes import INSTANCE_VARIABLE, ProcessLauncher, living
from batchlab.cli.fork_server_main import NAME, serve_forks
from batchlab.core.model import Pool
from batchlab.core.operating_system import CAN_FORK
from batchlab.core.operating_system.processes import parent_of
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from tests.support.docker.launcher import soon

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="this system has no fork server")

POOL = Pool("default", max_size=4)
P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def opened(folder: Path) -> tuple[ProcessLauncher, Home]:
    home = Home(folder)
    home.make()
    backend = factory.load("local")
    launcher = backend.open_launcher(home, backend.open_clock())
    assert isinstance(launcher, ProcessLauncher)
    return launcher, home


@asynccontextmanager
async def launcher_in(folder: Path) -> AsyncIterator[tuple[ProcessLauncher, Home]]:
    launcher, home = opened(folder)
    try:
        yield launcher, home
    finally:
        await launcher.close(kill=True)


def parent(pid: int) -> int:
    found = parent_of(pid)
    assert found is not None
    return found


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def begun(home: Home, instance: str) -> int:
    """Wait until a forked worker is running, and return its pid. Without a manager, queues do not exist."""
    await working(home, instance)
    pid = living(home.fleet)[instance]
    assert name(pid) == NAME
    return pid


async def working(home: Home, instance: str) -> None:
    log = home.fleet / "logs" / f"{instance}.log"
    await soon(lambda: "no messages can be received" in log.read_text())


async def end(launcher: ProcessLauncher, instance: str) -> str:
    async def told() -> str:
        while (how := (await launcher.running())[instance]) is None:
            await asyncio.sleep(0.02)
        return how

    return await asyncio.wait_for(told(), 30)


@in_loop
async def test_instances_are_copies_that_lead_sessions_of_their_own(tmp_path: Path) -> None:
    async with launcher_in(tmp_path) as (launcher, home):
        for one in ("w-1", "w-2"):
            await launcher.launch(POOL, one)
        first, second = [await begun(home, one) for one in ("w-1", "w-2")]
        assert parent(first) == parent(second) != os.getpid()
        assert parent(parent(first)) == os.getpid()
        assert [os.getsid(pid) for pid in (first, second)] == [first, second]
        await launcher.terminate("w-1", grace_s=30)
        assert await end(launcher, "w-1") == "exit 0"
        os.kill(second, signal.SIGKILL)
        assert await end(launcher, "w-2") == "killed by SIGKILL, exit -9"
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)  # the process is not even a zombie


def test_forked_worker_gets_its_instance_id_in_the_environment(tmp_path: Path) -> None:
    """The processes of the worker's tasks read the instance id from their environment."""
    with Grid("local", home=tmp_path, workers=1) as grid:
        (told,) = grid.map(lambda name: os.environ.get(name), [INSTANCE_VARIABLE])
        assert {told} == set(living(Home(tmp_path).fleet))


@in_loop
async def test_a_pool_with_an_environment_gets_processes_that_read_it_as_they_begin(tmp_path: Path) -> None:
    async with launcher_in(tmp_path) as (launcher, home):
        await launcher.launch(replace(POOL, env=(("PYTHONHASHSEED", "7"),)), "w-1")
        pid = living(home.fleet)["w-1"]
        assert parent(pid) == os.getpid()
        environment = Path(f"/proc/{pid}/environ")
        await soon(lambda: b"PYTHONHASHSEED=7" in environment.read_bytes().split(b"\0"))


@in_loop
async def test_instances_survive_the_death_of_the_fork_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with launcher_in(tmp_path) as (launcher, home):
        await launcher.launch(POOL, "w-1")
        pid = await begun(home, "w-1")
        os.kill(fork_server := parent(pid), signal.SIGKILL)
        await soon(lambda: parent(pid) != fork_server)
        await launcher.launch(POOL, "w-2")
        await working(home, "w-2")
        assert set(living(home.fleet)) == {"w-1", "w-2"}
        await launcher.terminate("w-1", grace_s=30)
        assert await end(launcher, "w-1") == (
            "exited; its exit code is unknown, because the fork server that started it has ended"
        )
        await launcher.terminate("w-2", grace_s=30)
        assert await end(launcher, "w-2") == "exit 0"


@in_loop
async def test_instances_start_without_a_fork_server_that_cannot_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = Home(tmp_path)
    home.make()
    backend = factory.load("local")
    fork_server = ForkServer(["/nowhere/python"], [], tmp_path / "fork_server.log")
    launcher = ProcessLauncher(
        home.fleet, lambda *_: ["sleep", "60"], backend.open_clock(), dict(os.environ), fork_server
    )
    try:
        await launcher.launch(POOL, "w-1")
        assert parent(living(home.fleet)["w-1"]) == os.getpid()
        assert "start more slowly" in caplog.text
    finally:
        await launcher.close(kill=True)


@in_loop
async def test_forked_process_without_a_record_exits(tmp_path: Path) -> None:
    fork_server = opened(tmp_path)[0]._fork_server
    assert fork_server
    with (tmp_path / "out").open("wb") as output:
        fork = await fork_server.fork(["python", "-P", "-m", "batchlab", "worker"], {}, output)
    assert name(fork.pid) != NAME, "it waits for the word"
    fork.close()
    assert await fork_server.exit_code(fork.pid) == 0
    fork_server.close()
    assert (tmp_path / "out").read_bytes() == b""


@in_loop
async def test_fork_server_exits_with_its_launcher_and_instances_do_not(tmp_path: Path) -> None:
    launcher, home = opened(tmp_path)
    try:
        await launcher.launch(POOL, "w-1")
        pid = await begun(home, "w-1")
        fork_server = parent(pid)
    finally:
        await launcher.close(kill=False)
    with pytest.raises(ProcessLookupError):
        os.kill(fork_server, 0)
    async with launcher_in(tmp_path) as (after, _):
        assert await after.running() == {"w-1": None}
        assert living(home.fleet) == {"w-1": pid}


@in_loop
async def test_requests_at_the_same_time_are_answered_in_order(tmp_path: Path) -> None:
    """The stream of requests does not mix the descriptors of two forks."""
    fork_server = opened(tmp_path)[0]._fork_server
    assert fork_server
    argv = ["python", "-P", "-m", "batchlab", "worker"]

    async def exited_fork() -> tuple[int, int | None]:
        with (tmp_path / "out").open("ab") as output:
            fork = await fork_server.fork(argv, {}, output)
        fork.close()
        return fork.pid, await fork_server.exit_code(fork.pid)

    done = await asyncio.gather(*(exited_fork() for _ in range(20)))
    assert len({pid for pid, _ in done}) == 20
    assert {code for _, code in done} == {0}
    fork_server.close()


@pytest.mark.parametrize("pieces", [(b'{"bury": 1}\n{"bury": 1}\n',), (b'{"bu', b'ry": 1}\n{"bury', b'": 1}\n')])
def test_a_request_may_arrive_in_pieces_or_with_another(pieces: tuple[bytes, ...]) -> None:
    client, server = socket.socketpair()
    with client, server:
        for piece in pieces[:-1]:
            client.sendall(piece)
        serving = threading.Thread(target=serve_forks, args=(server,))
        serving.start()
        time.sleep(0.05)
        client.sendall(pieces[-1])
        client.shutdown(socket.SHUT_WR)
        serving.join(30)
        assert not serving.is_alive()
        assert client.recv(1000) == b'{"code": null}\n' * 2, "no child process of this process has the pid 1"
