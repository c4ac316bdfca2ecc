"""The container launcher with real containers: limits, boots, exhausted memory, pauses, and networks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from batchlab.adapters.docker.container import Template
from batchlab.adapters.docker.engine import Engine, find_resources
from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.model import Machine, Market, Pool
from batchlab.core.ports import KEEP_ENDED_S
from tests.support.docker.containers import DockerGrid, docker_grid, ensure_network, python, shell
from tests.support.docker.launcher import DEADLINE_S, end_of, run, soon, up
from tests.support.fleet import BROKEN, STEADY, STUBBORN, LoopClock, ManualClock, behaving

SMALL = Machine("t3.nano", "us-east-1a", Market.SPOT)
"""An instance type with 512 MiB of memory."""


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[DockerGrid]:
    with docker_grid(tmp_path) as made:
        yield made


async def printed_by(grid: DockerGrid, template: Template, machine: Machine, **more: Any) -> str:
    """Return the output of a container that ends by itself."""
    launcher = grid.launcher(lambda _: template, LoopClock(), **more)
    try:
        await launcher.launch(Pool("p", slots=3, env=(("MINE", "yes"),)), "i-1", machine)
        assert await end_of(launcher, "i-1") == "exit 0"
        return grid.printed("i-1")
    finally:
        await launcher.close(kill=True)


# --- Properties of a container --------------------------------------------------------------------

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
        # Version 1 of cgroups counts memory and swap together, and version 2 counts swap alone.
        assert seen["swap"] in ([str(256 * 1024**2)], ["0"])
        assert seen["cpu"][0] == "100000"  # of 100,000 µs, which is one CPU, or half of two
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
            "BATCHLAB_GPUS": "0",
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
            with pytest.raises(BackendError, match=r"instance type 'm7i\.lrge'"):
                await launcher.launch(STEADY, "i-1", Machine("m7i.lrge"))
            assert await launcher.running() == {}
        finally:
            await launcher.close(kill=True)

    run(main)


def test_missing_program_ends_the_instance_with_the_reason(grid: DockerGrid) -> None:
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
            assert loop.time() - launched_s >= 3.0
        finally:
            await after.close(kill=True)

    run(main)


def test_an_instance_that_still_boots_is_called_off(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock(), boot_s=60.0)
        try:
            await launcher.launch(STEADY, "i-1")
            await launcher.terminate("i-1", grace_s=60.0)
            assert await launcher.running() == {"i-1": "killed by SIGTERM, exit -15"}
            with Engine() as engine:
                assert find_resources(engine, grid.labels) == []
        finally:
            await launcher.close(kill=True)

    run(main)


def test_termination_during_the_start_is_delivered(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            for n in range(3):
                await launcher.launch(STEADY, f"i-{n}")
                await asyncio.sleep(0.05 * n)
                await launcher.terminate(f"i-{n}", grace_s=60.0)
            for n in range(3):
                assert await end_of(launcher, f"i-{n}") in ("exit 0", "killed by SIGTERM, exit -15")
        finally:
            await launcher.close(kill=True)

    run(main)


# --- Ends -----------------------------------------------------------------------------------------

_EAT = "print('up'); hoard = []\nwhile True: hoard.append(bytearray(b'x' * 2**24))"


def test_memory_that_runs_out_is_named(grid: DockerGrid) -> None:
    """An exit code of 137 alone does not say what killed the process."""

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


def test_output_of_an_ended_instance_is_kept_and_its_container_removed(grid: DockerGrid) -> None:
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
                assert find_resources(engine, grid.labels) == []
            assert log.exists()
        finally:
            await launcher.close(kill=True)

    run(main)


def test_close_keeps_the_output_and_removes_the_containers(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        for n in range(3):
            await launcher.launch(STUBBORN, f"i-{n}")
        await up(grid, "i-0", "i-1", "i-2")
        await launcher.launch(STUBBORN, "i-late")
        await launcher.close(kill=True)
        with Engine() as engine:
            assert find_resources(engine, grid.labels) == []
        assert (grid.root / "logs" / "i-0.log").read_text() == "up\n"

    run(main)


def test_removed_container_has_ended(grid: DockerGrid) -> None:
    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            await launcher.launch(STUBBORN, "i-1")
            await up(grid, "i-1")
            launcher.changed.clear()
            grid.api.remove_container(grid.name("i-1"), force=True)
            await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
            assert await end_of(launcher, "i-1") in ("its container was removed", "killed by SIGKILL, exit -9")
            await launcher.terminate("i-1", grace_s=0.0)
        finally:
            await launcher.close(kill=True)

    run(main)


def test_running_container_missing_from_the_list_is_running(grid: DockerGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, on a busy machine, the list of containers was newer than the data of one container, which was reported as
    ended with exit code 0. The real exit code arrives a moment later."""
    listed = APIClient.containers

    def early(api: APIClient, **options: Any) -> list[dict[str, Any]]:
        return [{**row, "State": "exited"} for row in listed(api, **options)]

    async def main() -> None:
        launcher = grid.launcher(behaving, LoopClock())
        try:
            await launcher.launch(STEADY, "i-1")
            await up(grid, "i-1")
            with monkeypatch.context() as patch:
                patch.setattr(APIClient, "containers", early)
                assert await launcher.running() == {"i-1": None}
            grid.api.kill(grid.name("i-1"))
            assert await end_of(launcher, "i-1") == "killed by SIGKILL, exit -9"
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
            # The first instance continues and drains. The second instance stays paused, and is killed.
            await launcher.terminate("i-1", grace_s=60.0)
            assert await end_of(launcher, "i-1") == "exit 0"
            await launcher.terminate("i-2", grace_s=0.0)
            assert await end_of(launcher, "i-2") == "killed by SIGKILL, exit -9"
        finally:
            await launcher.close(kill=True)

    run(main)


def test_a_container_without_its_network_lives(grid: DockerGrid) -> None:
    async def main() -> None:
        with Engine() as engine:
            ensure_network(engine, grid.id, grid.labels)
        launcher = grid.launcher(lambda _: shell("echo up; sleep 100", network=grid.id), LoopClock())
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
