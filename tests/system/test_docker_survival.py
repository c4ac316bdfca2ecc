"""Containers whose manager was killed or whose Docker does not answer, and the cleanup."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.transport.unixconn import UnixHTTPConnection

from batchlab.adapters.docker.engine import Engine, find_resources, remove_resources
from batchlab.adapters.docker.launcher import SETTLED_S
from batchlab.adapters.local.state_files import StateFile
from batchlab.core.errors import AlreadyExists, Unreachable, UsageError
from batchlab.fleet.fleet_port import ManagedFleet
from tests.support.docker.containers import DockerGrid, docker_grid, ensure_network, shell
from tests.support.docker.launcher import DEADLINE_S, end_of, run, up
from tests.support.docker.socket_proxy import Proxy
from tests.support.fleet import STEADY, STUBBORN, CountedIds, LoopClock, behaving, counted, names
from tests.support.waiting import until


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[DockerGrid]:
    with docker_grid(tmp_path) as made:
        yield made


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the SDK's resource warning: the SDK leaves the socket of a refused connection to the garbage collector,
    and tests treat the warning as an error."""

    def connect(self: Any) -> None:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.settimeout(self.timeout)
            made.connect(self.unix_socket)
        except OSError:
            made.close()
            raise
        self.sock = made

    monkeypatch.setattr(UnixHTTPConnection, "connect", connect)


# --- A manager that was killed --------------------------------------------------------------------

_MANAGER = """
import asyncio, os, signal, sys
from pathlib import Path
from docker import APIClient
from batchlab.adapters.local.state_files import StateFile
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.core.model import Pool
from tests.support.docker.containers import DockerGrid
from tests.support.fleet import STEADY, CountedIds, LoopClock, behaving

async def main(grid, what):
    launcher = grid.launcher(behaving, LoopClock())
    if what == "fleet":
        store = StateFile(grid.root / "fleet.json")
        fleet = ManagedFleet(launcher, LoopClock(), CountedIds(), store)
        await fleet.ensure(STEADY)
        await fleet.set_desired("steady", 2, cause="a user request")
        await fleet.tick()
        names = ["w-0001", "w-0002"]
    else:
        names = what.split(",")
        for name in names:
            await launcher.launch(Pool(name.partition("-")[0]), name)
    while any("up" not in grid.printed(name) for name in names):
        await asyncio.sleep(0.02)
    for name in names:
        if name.endswith("-ending"):
            await launcher.terminate(name, grace_s=float(sys.argv[4]))
    os.kill(os.getpid(), signal.SIGKILL)

grid = DockerGrid(sys.argv[1], APIClient(version="auto"), Path(sys.argv[2]))
asyncio.run(main(grid, sys.argv[3]))
"""


def killed_manager(grid: DockerGrid, what: str, grace_s: float = 60.0) -> None:
    """Run a manager that launches instances (`steady-1,stubborn-ending`, or a `fleet`) and asks some of them to end,
    and kill it."""
    argv = [sys.executable, "-c", _MANAGER, grid.id, str(grid.root), what, str(grace_s)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_instances_outlive_their_manager_and_are_adopted(grid: DockerGrid) -> None:
    """The next manager adopts the instances of a killed manager."""
    killed_manager(grid, "steady-1,stubborn-2,steady-3,steady-4")
    grid.api.kill(grid.name("steady-4"))
    until(lambda: grid.state("steady-4")["Status"] == "exited", 60)

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            known = await launcher.running()
            assert list(known) == ["steady-1", "stubborn-2", "steady-3", "steady-4"]
            assert known["steady-4"] == "killed by SIGKILL, exit -9"
            await launcher.terminate("steady-1", grace_s=60.0)
            await launcher.terminate("stubborn-2", grace_s=0.1)
            grid.api.kill(grid.name("steady-3"))
            assert await end_of(launcher, "steady-1") == "exit 0"
            assert await end_of(launcher, "stubborn-2") == "killed by SIGKILL, exit -9"
            assert await end_of(launcher, "steady-3") == "killed by SIGKILL, exit -9"
            with pytest.raises(AlreadyExists):
                await launcher.launch(STEADY, "steady-1")
        finally:
            await launcher.close(kill=True)

    run(main)


@pytest.mark.parametrize("away_s", [0.0, 3.0], ids=["within the grace", "after the grace"])
def test_a_deadline_outlives_the_manager_that_set_it(grid: DockerGrid, away_s: float) -> None:
    """A draining instance must end although its manager has died."""
    killed_manager(grid, "stubborn-ending,steady-1", grace_s=2.5)
    time.sleep(away_s)

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            await launcher.running()
            assert await end_of(launcher, "stubborn-ending") == "killed by SIGKILL, exit -9"
            assert (await launcher.running())["steady-1"] is None
            assert list((grid.root / "ending").iterdir()) == []
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_deadline_is_for_one_container_only(grid: DockerGrid) -> None:
    """The stored deadline may belong to an older container of the same name."""
    killed_manager(grid, "steady-1")
    (grid.root / "ending").mkdir()
    note = {"container": "another", "by_s": 0.0}
    (grid.root / "ending" / "steady-1.json").write_text(json.dumps(note))

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            assert await launcher.running() == {"steady-1": None}
            await asyncio.sleep(1.0)
            assert await launcher.running() == {"steady-1": None}
        finally:
            await launcher.close(kill=True)

    run(main)


def test_fleet_continues_after_its_manager_was_killed(grid: DockerGrid) -> None:
    """The next manager continues the fleet of a killed manager."""
    killed_manager(grid, "fleet")
    grid.api.kill(grid.name("w-0001"))

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        ids = CountedIds()
        ids.count = 2
        try:
            store = StateFile(grid.root / "fleet.json")
            fleet = ManagedFleet(launcher, LoopClock(), ids, store)
            dead = [*await fleet.tick(), *await fleet.tick()]
            while not dead:  # Docker reports the kill only after a while
                await asyncio.sleep(0.1)
                dead += [*await fleet.tick(), *await fleet.tick()]
            assert [(i.id, i.note) for i in dead] == [("w-0001", "killed by SIGKILL, exit -9")]
            (view,) = await fleet.describe()
            assert counted(view) == ["w-0002", "w-0003"]
            assert names(view.instances)
        finally:
            await launcher.close(kill=True)

    run(main)


# --- Docker does not answer -----------------------------------------------------------------------


def test_missing_docker_is_a_clear_error(grid: DockerGrid, tmp_path: Path, refused: None) -> None:
    async def main() -> None:
        engine = Engine(f"unix://{tmp_path}/none.sock")
        launcher = grid.launcher(behaving, LoopClock(), engine=engine)
        try:
            for call in (
                launcher.running(),
                launcher.launch(STEADY, "i-1"),
                launcher.terminate("i-1", grace_s=0.0),
                launcher.metadata("172.17.0.2"),
            ):
                with pytest.raises(Unreachable, match=r"Docker does not answer \(No such file.*\)\. Start Docker"):
                    await call
        finally:
            await launcher.close(kill=False)

    run(main)


def test_docker_may_stop_and_restart(grid: DockerGrid, tmp_path: Path, refused: None) -> None:
    async def main() -> None:
        with Proxy(tmp_path / "docker.sock") as proxy:
            engine = Engine(proxy.url)
            launcher = grid.launcher(behaving, LoopClock(), engine=engine)
            try:
                await launcher.launch(STEADY, "i-1")
                await launcher.launch(STUBBORN, "i-2")
                await up(grid, "i-1", "i-2")
                await asyncio.sleep(SETTLED_S)
                launcher.changed.clear()
                proxy.cut()
                await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
                with pytest.raises(Unreachable, match="Docker does not answer"):
                    await launcher.running()
                with pytest.raises(Unreachable):
                    await launcher.launch(STEADY, "i-3")
                # The signal is lost, but the deadline remains.
                with pytest.raises(Unreachable):
                    await launcher.terminate("i-2", grace_s=0.0)
                grid.api.kill(grid.name("i-1"))
                await asyncio.sleep(0.1)
                launcher.changed.clear()
                proxy.mend()
                await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
                assert await end_of(launcher, "i-1") == "killed by SIGKILL, exit -9"
                assert await end_of(launcher, "i-2") == "killed by SIGKILL, exit -9"
                await launcher.launch(STEADY, "i-3")
                await up(grid, "i-3")
                launcher.changed.clear()
                grid.api.kill(grid.name("i-3"))
                await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
            finally:
                await launcher.close(kill=True)

    run(main)


# --- Sweeping -------------------------------------------------------------------------------------


def test_a_sweep_takes_everything_with_the_labels_and_nothing_else(grid: DockerGrid) -> None:
    other = {"batchlab.grid": f"{grid.id}-other"}
    with Engine() as engine:
        try:
            for number, labels in enumerate((grid.labels, other)):
                name = f"{grid.id}-{number}"
                gateway = ensure_network(engine, name, labels)
                assert ensure_network(engine, name, labels) == gateway
                grid.api.create_volume(name, labels=labels)
                host = grid.api.create_host_config(network_mode=name)
                image, command = shell("").image, ["sleep", "100"]
                grid.api.create_container(image, command, name=name, labels=labels, host_config=host)
                grid.api.start(name)
            # A foreign container in the network must not keep the network.
            grid.api.connect_container_to_network(f"{grid.id}-1", f"{grid.id}-0")
            assert kinds(engine, grid.labels) == ["container", "network", "volume"]
            assert len(find_resources(engine, {"batchlab.grid": None, **grid.labels})) == 3
            swept = remove_resources(engine, grid.labels)
            assert sorted(one.kind for one in swept) == ["container", "network", "volume"]
            assert {one.name for one in swept} == {f"{grid.id}-0"}
            assert kinds(engine, grid.labels) == []
            assert remove_resources(engine, grid.labels) == []
            assert kinds(engine, other) == ["container", "network", "volume"]
        finally:
            remove_resources(engine, other)
        assert kinds(engine, other) == []
        with pytest.raises(UsageError, match="At least one label is required"):
            remove_resources(engine, {})


def kinds(engine: Engine, labels: dict[str, str]) -> list[str]:
    return sorted(resource.kind for resource in find_resources(engine, labels))


def test_close_leaves_no_thread_and_no_file(grid: DockerGrid) -> None:
    async def main() -> None:
        before = descriptors()
        for _ in range(3):
            launcher = grid.launcher(behaving, LoopClock())
            await launcher.running()
            await launcher.close(kill=True)
        assert descriptors() == before

    run(main)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
