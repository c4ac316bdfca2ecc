"""An emulator that is killed between two calls and restarts at the same address.

The adapters continue after the restart. Kept content is available, and lost content is reported as missing and can be
created again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.adapters.aws.objects import open_s3
from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.adapters.local.ministack import Emulator
from batchlab.core.errors import NotFound, Unreachable
from batchlab.core.ports import Outgoing, QueueSpec
from tests.support.aws.emulators import EMULATORS, localstack_python, localstack_server, ministack_python, moto_server

pytestmark = pytest.mark.slow


class Killable(Protocol):
    """A server of S3 and SQS that a test may end and start."""

    def start(self) -> None: ...

    def kill(self) -> None: ...


class World:
    """A server, and whether it keeps its objects when it is killed."""

    def __init__(self, server: Killable, endpoint: Endpoint, *, keeps_objects: bool) -> None:
        self.server = server
        self.endpoint = endpoint
        self.keeps_objects = keeps_objects


@pytest.fixture(params=EMULATORS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Start a server for one test."""
    if request.param == "ministack":
        with Emulator(ministack_python(), tmp_path) as emulator:
            yield World(emulator, emulator.endpoint, keeps_objects=True)
        return
    if request.param == "localstack":
        server = localstack_server(localstack_python(), tmp_path)
    else:
        server = moto_server(tmp_path)
    try:
        server.start()
        yield World(server, server.endpoint, keeps_objects=False)
    finally:
        server.kill()


def test_resources_lost_by_a_killed_emulator_can_be_created_again(world: World) -> None:
    async def go_on() -> None:
        bucket = f"kept-{os.getpid()}"
        objects, queue = open_s3(world.endpoint, bucket), SqsQueue(world.endpoint)
        try:
            await objects.put("folder/a", b"first", if_absent=True)
            await queue.ensure(QueueSpec("q"))
            await queue.send("q", [Outgoing("before")])
            (held,) = await queue.receive("q")
            waiting = asyncio.create_task(queue.receive("q", wait_s=10))
            await asyncio.sleep(0)  # its request is in transit or about to be sent
            await asyncio.to_thread(world.server.kill)
            await asyncio.to_thread(world.server.start)
            with pytest.raises((NotFound, Unreachable)):
                await waiting
            # A lost queue must not look like an empty queue.
            with pytest.raises(NotFound):
                await queue.send("q", [Outgoing("lost")])
            with pytest.raises(NotFound):
                await queue.delete("q", [held.receipt])
            await queue.ensure(QueueSpec("q"))
            await queue.send("q", [Outgoing("after")])
            await queue.delete("q", [held.receipt])  # the delete may be refused, and deletes nothing
            assert [one.body for one in await queue.receive("q")] == ["after"]
            if world.keeps_objects:
                assert await objects.get("folder/a") == b"first"
            else:
                with pytest.raises(NotFound):
                    await objects.get("folder/a")
                await objects.put("folder/a", b"again", if_absent=True)
        finally:
            await queue.close()

    asyncio.run(go_on())
