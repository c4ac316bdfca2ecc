"""What only real containers can show: limits, memory that runs out, pauses, networks, a manager
that is killed, a Docker that is away."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.transport.unixconn import UnixHTTPConnection

from batchlab.adapters.docker import SETTLED_S, ContainerLauncher, Template
from batchlab.adapters.docker_engine import Engine, find, sweep
from batchlab.adapters.process import KEEP_ENDED_S
from batchlab.adapters.state_file import StateFile
from batchlab.errors import AlreadyExists, BackendError, Unreachable, UsageError
from batchlab.fleet.group import ManagedFleet
from batchlab.model import Machine, Market, Pool
from tests.containers import DockerGrid, docker_grid, ensure_network, python, shell
from tests.docker_proxy import Proxy
from tests.fleet_rigs import (
    BROKEN,
    STEADY,
    STUBBORN,
    CountedIds,
    LoopClock,
    ManualClock,
    behaving,
    counted,
    names,
)

DEADLINE_S = 30.0
SMALL = Machine("t3.nano", "us-east-1a", Market.SPOT)
"""512 MiB."""


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[DockerGrid]:
    with docker_grid(tmp_path) as made:
        yield made


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK leaves the socket of a refused connection to the garbage collector, which is an
    error in tests."""

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


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 3 * DEADLINE_S))
    gc.collect()  # what is left open is to be found in the test that did it


async def soon(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "never came about"
        await asyncio.sleep(0.02)


async def up(grid: DockerGrid, *instances: str) -> None:
    for instance in instances:
        await soon(lambda instance=instance: "up" in grid.printed(instance))  # type: ignore[misc]


async def end_of(launcher: ContainerLauncher, instance: str) -> str:
    """How it ends, as whoever waits for `changed` hears of it."""
    while (how := (await launcher.running())[instance]) is None:
        launcher.changed.clear()
        await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
    return how


async def printed_by(grid: DockerGrid, template: Template, machine: Machine, **more: Any) -> str:
    """What a container prints that ends by itself."""
    launcher = grid.launcher(lambda _: template, LoopClock(), **more)
    try:
        await launcher.launch(Pool("p", slots=3, env=(("MINE", "yes"),)), "i-1", machine)
        assert await end_of(launcher, "i-1") == "exit 0"
        return grid.printed("i-1")
    finally:
        await launcher.close(kill=True)


# --- What a container is --------------------------------------------------------------------------

_LOOK = """
import json, os, pathlib
def first(*paths):
    return next(pathlib.Path(p).read_text().split() for p in paths if pathlib.Path(p).exists())
def may_write(path):
    try:
        pathlib.Path(path, "probe").write_text("x")
    except OSError as error:
        return error.strerror
    return "yes"
status = dict(l.split(":\\t", 1) for l in pathlib.Path("/proc/self/status").read_text().splitlines()
              if ":\\t" in l)
print(json.dumps({
    "memory": first("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    "swap": first("/sys/fs/cgroup/memory.swap.max",
                  "/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes",
                  "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    "cpu": first("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    "pids": first("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max"),
    "ids": [os.getuid(), os.getgid()],
    "caps": [status[k].strip() for k in ("CapEff", "CapPrm", "CapBnd")],
    "no_new_privs": status["NoNewPrivs"].strip(),
    "root": may_write("/"), "etc": may_write("/etc"), "tmp": may_write("/tmp"),
    "hostname": os.uname().nodename,
    "env": {k: v for k, v in os.environ.items() if k.startswith(("BATCHLAB", "MINE", "GIVEN"))},
    "process_1": pathlib.Path("/proc/1/comm").read_text().strip(),
}))
"""


def test_limits_rights_and_environment_are_what_they_should_be(grid: DockerGrid) -> None:
    async def main() -> None:
        template = python(_LOOK, env={"GIVEN": "1"}, pids=64)
        seen = json.loads(await printed_by(grid, template, SMALL, scale=0.5))
        assert seen["memory"] == [str(256 * 1024**2)]
        # Version 1 counts memory and swap together, version 2 swap alone.
        assert seen["swap"] in ([str(256 * 1024**2)], ["0"])
        assert seen["cpu"][0] == "100000"  # of 100,000 µs: one CPU, half of two
        assert seen["pids"] == ["64"]
        assert seen["ids"] == [65534, 65534]
        assert {int(mask, 16) for mask in seen["caps"]} == {0}
        assert seen["no_new_privs"] == "1"
        assert [seen["root"], seen["etc"], seen["tmp"]] == ["Read-only file system"] * 2 + ["yes"]
        assert seen["hostname"] == "i-1"
        assert seen["process_1"] == "docker-init"
        assert seen["env"] == {
            "BATCHLAB_INSTANCE": "i-1",
            "BATCHLAB_INSTANCE_TYPE": "t3.nano",
            "BATCHLAB_MARKET": "spot",
            "BATCHLAB_POOL": "p",
            "BATCHLAB_SLOTS": "3",
            "BATCHLAB_ZONE": "us-east-1a",
            "GIVEN": "1",
            "MINE": "yes",
        }

    run(main)


def test_a_container_carries_its_labels_and_its_grids(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(lambda _: shell("sleep 100", labels={"team": "x"}), LoopClock())
        try:
            await launcher.launch(STEADY, "i-1", SMALL)
            made = grid.api.inspect_container(grid.name("i-1"))["Config"]
            for name, value in {
                "batchlab.grid": grid.id,
                "batchlab.instance": "i-1",
                "batchlab.instance-type": "t3.nano",
                "batchlab.market": "spot",
                "batchlab.pool": "steady",
                "batchlab.zone": "us-east-1a",
                "team": "x",
            }.items():
                assert made["Labels"][name] == value
            assert (made["StopSignal"], made["StopTimeout"]) == ("SIGTERM", 30)
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_type_that_is_not_in_the_catalogue_is_a_launch_that_fails(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            with pytest.raises(BackendError, match=r"no instance type 'm7i\.lrge'"):
                await launcher.launch(STEADY, "i-1", Machine("m7i.lrge"))
            assert await launcher.running() == {}
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_program_that_is_not_there_ends_the_instance_with_the_reason(grid: DockerGrid) -> None:
    async def main() -> None:
        template = Template(shell("").image, ("/nonexistent/worker",), init=False)
        launcher = grid.launcher(lambda _: template, LoopClock())
        try:
            await launcher.launch(STEADY, "i-1")
            how = await end_of(launcher, "i-1")
            assert how.startswith("cannot be started: ")
            assert "/nonexistent/worker" in how
            assert "no such file" in how
        finally:
            await launcher.close(kill=True)

    run(main)


# --- Boot delay -----------------------------------------------------------------------------------


def test_an_instance_boots_before_it_starts_and_a_restart_changes_nothing(grid: DockerGrid) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = grid.launcher(behaving, LoopClock(), boot_s=3.0)
        await before.launch(STEADY, "i-1")
        launched_s = loop.time()
        await asyncio.sleep(1.0)
        assert grid.state("i-1")["Status"] == "created"
        assert await before.running() == {"i-1": None}
        await before.close(kill=False)
        after = grid.launcher(behaving, LoopClock(), boot_s=3.0)
        try:
            assert await after.running() == {"i-1": None}
            await soon(lambda: grid.state("i-1")["Status"] == "running")
            assert 3.0 <= loop.time() - launched_s < 6.0
        finally:
            await after.close(kill=True)

    run(main)


def test_an_instance_that_still_boots_is_called_off(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock(), boot_s=60.0)
        try:
            await launcher.launch(STEADY, "i-1")
            await launcher.terminate("i-1", grace_s=60.0)
            assert await launcher.running() == {"i-1": "exit -15"}
            with Engine() as engine:
                assert find(engine, grid.labels) == []
        finally:
            await launcher.close(kill=True)

    run(main)


def test_one_that_is_asked_to_end_while_it_starts_hears_of_it(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            for n in range(3):
                await launcher.launch(STEADY, f"i-{n}")
                await asyncio.sleep(0.05 * n)
                await launcher.terminate(f"i-{n}", grace_s=60.0)
            for n in range(3):
                assert await end_of(launcher, f"i-{n}") in ("exit 0", "exit -15")
        finally:
            await launcher.close(kill=True)

    run(main)


# --- Ends -----------------------------------------------------------------------------------------

_EAT = "print('up'); hoard = []\nwhile True: hoard.append(bytearray(b'x' * 2**24))"


def test_memory_that_runs_out_is_named(grid: DockerGrid) -> None:
    """Pain 7: exit code 137, and nobody can tell who sent it."""

    async def main() -> None:
        launcher = grid.launcher(lambda _: python(_EAT), LoopClock(), scale=0.25)
        try:
            await launcher.launch(STEADY, "i-1", SMALL)
            assert await end_of(launcher, "i-1") == "out of memory"
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_task_that_runs_out_of_memory_is_not_the_end_of_its_instance(grid: DockerGrid) -> None:
    async def main() -> None:
        script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_EAT!r}])\n"
        template = python(script + "print('survived'); sys.exit(4)")
        launcher = grid.launcher(lambda _: template, LoopClock(), scale=0.25)
        try:
            await launcher.launch(STEADY, "i-1", SMALL)
            assert await end_of(launcher, "i-1") == "exit 4"
            assert grid.printed("i-1").endswith("survived\n")
        finally:
            await launcher.close(kill=True)

    run(main)


def test_what_an_ended_instance_printed_is_kept_and_in_time_its_container_goes(
    grid: DockerGrid,
) -> None:
    clock = ManualClock()

    async def main() -> None:
        template = shell("echo out; echo err >&2; exit 7")
        launcher = grid.launcher(lambda _: template, clock)
        try:
            await launcher.launch(BROKEN, "i-1")
            assert await end_of(launcher, "i-1") == "exit 7"
            log = grid.root / "logs" / "i-1.log"
            assert sorted(log.read_text().splitlines()) == ["err", "out"]
            with pytest.raises(AlreadyExists):
                await launcher.launch(BROKEN, "i-1")
            clock.time_s += KEEP_ENDED_S
            assert await launcher.running() == {"i-1": "exit 7"}
            clock.time_s += 1.0
            assert await launcher.running() == {}
            with Engine() as engine:
                assert find(engine, grid.labels) == []
            assert log.exists()
        finally:
            await launcher.close(kill=True)

    run(main)


def test_close_keeps_what_was_printed_and_leaves_no_container(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        for n in range(3):
            await launcher.launch(STUBBORN, f"i-{n}")
        await up(grid, "i-0", "i-1", "i-2")
        await launcher.launch(STUBBORN, "i-late")
        await launcher.close(kill=True)
        with Engine() as engine:
            assert find(engine, grid.labels) == []
        assert (grid.root / "logs" / "i-0.log").read_text() == "up\n"

    run(main)


def test_a_container_that_somebody_removed_has_ended(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            await launcher.launch(STUBBORN, "i-1")
            await up(grid, "i-1")
            launcher.changed.clear()
            grid.api.remove_container(grid.name("i-1"), force=True)
            await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
            assert await end_of(launcher, "i-1") in ("its container was removed", "exit -9")
            await launcher.terminate("i-1", grace_s=0.0)
        finally:
            await launcher.close(kill=True)

    run(main)


# --- Pauses and networks --------------------------------------------------------------------------


def test_a_paused_container_lives_and_can_be_ended(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            await launcher.launch(STEADY, "i-1")
            await launcher.launch(STUBBORN, "i-2")
            await up(grid, "i-1", "i-2")
            for name in ("i-1", "i-2"):
                grid.api.pause(grid.name(name))
            assert await launcher.running() == {"i-1": None, "i-2": None}
            # The first wakes up to drain; the second does not, and is killed.
            await launcher.terminate("i-1", grace_s=60.0)
            assert await end_of(launcher, "i-1") == "exit 0"
            await launcher.terminate("i-2", grace_s=0.0)
            assert await end_of(launcher, "i-2") == "exit -9"
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_container_without_its_network_lives(grid: DockerGrid) -> None:
    async def main() -> None:
        with Engine() as engine:
            ensure_network(engine, grid.id, grid.labels)
        launcher = grid.launcher(
            lambda _: shell("echo up; sleep 100", network=grid.id), LoopClock()
        )
        try:
            await launcher.launch(STEADY, "i-1")
            await up(grid, "i-1")
            networks = grid.api.inspect_container(grid.name("i-1"))["NetworkSettings"]["Networks"]
            address = networks[grid.id]["IPAddress"]
            found = await launcher.metadata(address)
            assert found is not None
            assert found.instance == "i-1"
            grid.api.disconnect_container_from_network(grid.name("i-1"), grid.id)
            assert await launcher.running() == {"i-1": None}
            while await launcher.metadata(address) is not None:
                await asyncio.sleep(0.02)
            grid.api.connect_container_to_network(grid.name("i-1"), grid.id)
            networks = grid.api.inspect_container(grid.name("i-1"))["NetworkSettings"]["Networks"]
            while await launcher.metadata(networks[grid.id]["IPAddress"]) is None:
                await asyncio.sleep(0.02)
        finally:
            await launcher.close(kill=True)

    run(main)


# --- A manager that was killed --------------------------------------------------------------------

_MANAGER = """
import asyncio, os, signal, sys
from pathlib import Path
from docker import APIClient
from batchlab.adapters.state_file import StateFile
from batchlab.fleet.group import ManagedFleet
from batchlab.model import Pool
from tests.containers import DockerGrid
from tests.fleet_rigs import STEADY, CountedIds, LoopClock, behaving

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
    """A manager that launched instances (`steady-1,stubborn-ending`, or a `fleet`), asked some to
    end, and was killed."""
    argv = [sys.executable, "-c", _MANAGER, grid.id, str(grid.root), what, str(grace_s)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_instances_outlive_their_manager_and_are_adopted(grid: DockerGrid) -> None:
    """Pain 11: jobs that ran on after the head died, and nobody could stop."""
    killed_manager(grid, "steady-1,stubborn-2,steady-3,steady-4")
    grid.api.kill(grid.name("steady-4"))

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            known = await launcher.running()
            assert list(known) == ["steady-1", "stubborn-2", "steady-3", "steady-4"]
            assert known["steady-4"] == "exit -9"
            await launcher.terminate("steady-1", grace_s=60.0)
            await launcher.terminate("stubborn-2", grace_s=0.1)
            grid.api.kill(grid.name("steady-3"))
            assert await end_of(launcher, "steady-1") == "exit 0"
            assert await end_of(launcher, "stubborn-2") == "exit -9"
            assert await end_of(launcher, "steady-3") == "exit -9"
            with pytest.raises(AlreadyExists):
                await launcher.launch(STEADY, "steady-1")
        finally:
            await launcher.close(kill=True)

    run(main)


@pytest.mark.parametrize("away_s", [0.0, 3.0], ids=["within the grace", "after the grace"])
def test_a_deadline_outlives_the_manager_that_set_it(grid: DockerGrid, away_s: float) -> None:
    """Pain 11: an instance that was being ended, and then ran for ever."""
    killed_manager(grid, "stubborn-ending,steady-1", grace_s=2.5)
    time.sleep(away_s)

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            await launcher.running()
            assert await end_of(launcher, "stubborn-ending") == "exit -9"
            assert (await launcher.running())["steady-1"] is None
            assert list((grid.root / "ending").iterdir()) == []
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_deadline_is_for_one_container_only(grid: DockerGrid) -> None:
    """A folder may be older than what runs."""
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


def test_a_fleet_goes_on_after_its_manager_was_killed(grid: DockerGrid) -> None:
    """Pain 11: the head died, and its fleet with it or without an owner."""
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
            while not dead:  # Docker says only a while later that it has killed it
                await asyncio.sleep(0.1)
                dead += [*await fleet.tick(), *await fleet.tick()]
            assert [(i.id, i.note) for i in dead] == [("w-0001", "exit -9")]
            (view,) = await fleet.describe()
            assert counted(view) == ["w-0002", "w-0003"]
            assert names(view.instances)
        finally:
            await launcher.close(kill=True)

    run(main)


# --- Docker that is away --------------------------------------------------------------------------


def test_no_docker_at_all_is_told_in_a_sentence(
    grid: DockerGrid, tmp_path: Path, refused: None
) -> None:
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
                with pytest.raises(
                    Unreachable, match=r"Docker does not answer \(No such file.*\)\. Start Docker"
                ):
                    await call
        finally:
            await launcher.close(kill=False)

    run(main)


def test_docker_may_go_away_and_come_back(grid: DockerGrid, tmp_path: Path, refused: None) -> None:
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
                # The signal is lost, the deadline is not.
                with pytest.raises(Unreachable):
                    await launcher.terminate("i-2", grace_s=0.0)
                grid.api.kill(grid.name("i-1"))
                await asyncio.sleep(0.1)
                launcher.changed.clear()
                proxy.mend()
                await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
                assert await end_of(launcher, "i-1") == "exit -9"
                assert await end_of(launcher, "i-2") == "exit -9"
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
                grid.api.create_container(
                    image, command, name=name, labels=labels, host_config=host
                )
                grid.api.start(name)
            # A stranger in the network must not keep it.
            grid.api.connect_container_to_network(f"{grid.id}-1", f"{grid.id}-0")
            assert kinds(engine, grid.labels) == ["container", "network", "volume"]
            assert len(find(engine, {"batchlab.grid": None, **grid.labels})) == 3
            swept = sweep(engine, grid.labels)
            assert sorted(one.kind for one in swept) == ["container", "network", "volume"]
            assert {one.name for one in swept} == {f"{grid.id}-0"}
            assert kinds(engine, grid.labels) == []
            assert sweep(engine, grid.labels) == []
            assert kinds(engine, other) == ["container", "network", "volume"]
        finally:
            sweep(engine, other)
        assert kinds(engine, other) == []
        with pytest.raises(UsageError, match="without a label"):
            sweep(engine, {})


def kinds(engine: Engine, labels: dict[str, str]) -> list[str]:
    return sorted(one.kind for one in find(engine, labels))


def test_no_thread_and_no_file_stays_after_close(grid: DockerGrid) -> None:
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
