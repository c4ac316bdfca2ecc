"""A container that boots systemd as an instance does, and shuts down as after the press of a power button."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab.adapters.docker.container import Template
from batchlab.adapters.docker.launcher import ContainerLauncher
from batchlab.core.model import Machine, Pool
from tests.support.aws.instance_boot import IMAGE, need_instances
from tests.support.docker.containers import DockerGrid, docker_grid
from tests.support.fleet import LoopClock
from tests.support.waiting import until

MACHINE = Machine("m7i.large", "us-east-1a")
SYSTEM = Template(IMAGE, (), network="none", system=True)
_IS_UP = ("systemctl", "is-active", "basic.target")
UNIT = """\
[Service]
ExecStart=/bin/sleep 1000
ExecStop=/bin/sh -c 'echo asked > /was-asked'
"""


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[DockerGrid]:
    need_instances()
    with docker_grid(tmp_path) as made:
        yield made


def run(grid: DockerGrid, *command: str) -> str:
    """Run a command in the instance, and return its output."""
    made = grid.api.exec_create(grid.name("i-1"), list(command))
    return bytes(grid.api.exec_start(made["Id"])).decode()


def launcher_of(grid: DockerGrid) -> ContainerLauncher:
    return grid.launcher(lambda _: SYSTEM, LoopClock())


def test_instance_boots_and_stops_its_services_before_its_end(grid: DockerGrid) -> None:
    async def begin() -> None:
        launcher = launcher_of(grid)
        await launcher.launch(Pool("p"), "i-1", MACHINE)
        await asyncio.to_thread(until, lambda: grid.state("i-1")["Running"], 30.0)
        # The boot never finishes, because the user data waits for a metadata service.
        await asyncio.to_thread(until, lambda: run(grid, *_IS_UP) == "active\n", 60.0)
        await launcher.close(kill=False)

    async def end() -> None:
        # The other launcher knows only what Docker reports.
        launcher = launcher_of(grid)
        await launcher.terminate("i-1", grace_s=30.0)
        while (await launcher.running())["i-1"] is None:
            await asyncio.sleep(0.1)
        assert (await launcher.running())["i-1"] != "killed by SIGKILL, exit -9"

    asyncio.run(asyncio.wait_for(begin(), 90))
    script = f"""
        cat > /etc/systemd/system/sleepy.service <<'END'\n{UNIT}\nEND
        systemctl daemon-reload && systemctl start sleepy && systemctl is-active sleepy
    """
    assert run(grid, "sh", "-ec", script) == "active\n"
    asyncio.run(asyncio.wait_for(end(), 60))
    kept, _ = grid.api.get_archive(grid.name("i-1"), "/was-asked")
    assert b"asked" in b"".join(kept)
    host = grid.api.inspect_container(grid.name("i-1"))["HostConfig"]
    assert not host["Privileged"]
    assert set(host["CapAdd"]) == {"SYS_ADMIN", "NET_ADMIN"}
