"""The metadata service inside a container. The service identifies the caller by its address, and delivers a Spot notice
to the right process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from batchlab.adapters.aws.metadata_server import Interruption, MetadataServer, Signals
from batchlab.adapters.clock import WallClock
from batchlab.adapters.docker.container import Template
from batchlab.adapters.docker.engine import Engine
from batchlab.adapters.docker.launcher import ContainerLauncher
from batchlab.core.model import Machine, Market, Pool
from tests.support.docker.containers import DockerGrid, docker_grid, ensure_network, python

DEADLINE_S = 60.0
SPOT = Machine("t3.nano", "us-west-2b", Market.SPOT)
ON_DEMAND = Machine("m7i.large", "us-west-2a")
POOL = Pool("spot-pool")

_CLIENT = """
import json, os, time, urllib.error, urllib.request
BASE = os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] + "/latest/"
def ask(path, method="GET", **headers):
    names = {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(BASE + path, headers=names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code
def token():
    return ask("api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
def get(path):
    return ask(path, X_aws_ec2_metadata_token=token())
"""

_TELL = (
    _CLIENT
    + """
paths = ["instance-id", "instance-type", "instance-life-cycle", "placement/availability-zone",
         "placement/region", "local-ipv4", "tags/instance/batchlab.pool", "spot/instance-action"]
print(json.dumps({path: get("meta-data/" + path) for path in paths}
                 | {"bare": ask("meta-data/instance-id"), "token": token()}), flush=True)
time.sleep(100)
"""
)

_HEED = (
    _CLIENT
    + """
print("up", flush=True)
while True:
    told = get("meta-data/spot/instance-action")
    if told != 404:
        print(told, flush=True)
        raise SystemExit(17)
    time.sleep(0.1)
"""
)


@dataclass
class Scene:
    """A launcher and a metadata service on the grid's network."""

    grid: DockerGrid
    launcher: ContainerLauncher
    signals: dict[str, Signals] = field(default_factory=dict)

    async def prints(self, instance: str) -> str:
        """Return the first line that the instance prints."""
        while not (printed := await asyncio.to_thread(self.grid.printed, instance)):
            await asyncio.sleep(0.05)
        return printed.splitlines()[0]

    async def ends(self, instance: str) -> str:
        while (how := (await self.launcher.running())[instance]) is None:
            await asyncio.sleep(0.05)
        return how


@pytest.fixture
def grid(tmp_path: Path) -> Iterator[DockerGrid]:
    with docker_grid(tmp_path) as made:
        yield made


def in_scene(grid: DockerGrid, script: str, check: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        with Engine() as engine:
            here = ensure_network(engine, grid.id, grid.labels)
        url = ""
        signals: dict[str, Signals] = {}

        def template(_: Pool) -> Template:
            return python(script, network=grid.id, env={"AWS_EC2_METADATA_SERVICE_ENDPOINT": url})

        launcher = grid.launcher(template, WallClock(), signals=lambda name: signals.get(name, Signals()))
        server = MetadataServer(launcher, WallClock())
        try:
            url = await server.start(here)
            assert urlsplit(url).hostname == here
            async with asyncio.timeout(DEADLINE_S):
                await check(Scene(grid, launcher, signals))
        finally:
            await server.close()
            await launcher.close(kill=True)

    asyncio.run(main())


def test_container_reads_only_its_own_metadata_with_a_token(grid: DockerGrid) -> None:
    async def check(scene: Scene) -> None:
        await scene.launcher.launch(POOL, "i-1", SPOT)
        await scene.launcher.launch(Pool("other"), "i-2", ON_DEMAND)
        first = told(await scene.prints("i-1"))
        second = told(await scene.prints("i-2"))
        assert first["instance-id"] == "i-1"
        assert first["instance-type"] == "t3.nano"
        assert first["instance-life-cycle"] == "spot"
        assert first["placement/availability-zone"] == "us-west-2b"
        assert first["placement/region"] == "us-west-2"
        assert first["tags/instance/batchlab.pool"] == "spot-pool"
        assert first["spot/instance-action"] == 404
        assert first["bare"] == 401
        assert second["instance-id"] == "i-2"
        assert second["instance-life-cycle"] == "on-demand"
        for name, seen in (("i-1", first), ("i-2", second)):
            networks = grid.api.inspect_container(grid.name(name))["NetworkSettings"]["Networks"]
            assert seen["local-ipv4"] == networks[grid.id]["IPAddress"]

    in_scene(grid, _TELL, check)


def test_reused_address_belongs_to_the_new_container(grid: DockerGrid) -> None:
    async def check(scene: Scene) -> None:
        await scene.launcher.launch(POOL, "i-1", SPOT)
        first = told(await scene.prints("i-1"))
        await scene.launcher.terminate("i-1", grace_s=0.0)
        await scene.ends("i-1")
        await scene.launcher.launch(POOL, "i-2", SPOT)
        second = told(await scene.prints("i-2"))
        assert second["local-ipv4"] == first["local-ipv4"], "else this shows nothing"
        assert second["instance-id"] == "i-2"

    in_scene(grid, _TELL, check)


def test_a_spot_notice_reaches_the_process_in_its_container_only(grid: DockerGrid) -> None:
    async def check(scene: Scene) -> None:
        for name in ("i-1", "i-2"):
            await scene.launcher.launch(POOL, name, SPOT)
            assert await scene.prints(name) == "up"
        scene.signals["i-1"] = Signals(interruption=Interruption(1_700_000_120.0))
        assert await scene.ends("i-1") == "exit 17"
        assert '"time": "2023-11-14T22:15:20Z"' in grid.printed("i-1")
        assert (await scene.launcher.running())["i-2"] is None

    in_scene(grid, _HEED, check)


def told(line: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(line)
    return found
