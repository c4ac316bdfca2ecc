"""Receivers in several processes of one network, which a sender wakes by a broadcast."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from batchlab.adapters.aws.network_wakeups import NetworkWakeups
from batchlab.adapters.clock import WallClock
from batchlab.adapters.local.local_wakeup_queue import POLL_S, WakeupQueue
from batchlab.adapters.local.sqlite_queue import SqliteQueue
from batchlab.core.errors import Unreachable
from batchlab.core.ports import Message, Outgoing, QueueSpec
from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_deployment import METADATA_VARIABLE, Deployment
from batchlab.runtime.home import Home

LOOPBACK = "127.255.255.255"


class CountedQueue(SqliteQueue):
    """Queue that counts the receives."""

    receives = 0

    async def receive(
        self, queue: str, *, max_messages: int = 10, wait_s: float = 20.0, visibility_s: float | None = None
    ) -> Sequence[Message]:
        self.receives += 1
        return await super().receive(queue, max_messages=max_messages, wait_s=wait_s, visibility_s=visibility_s)


def test_broadcast_wakes_the_receivers_of_its_queue_only(tmp_path: Path) -> None:
    async def run() -> None:
        services = [CountedQueue(tmp_path / "queue.db", WallClock()) for _ in range(4)]
        *receivers, sender = (WakeupQueue(service, NetworkWakeups(LOOPBACK)) for service in services)
        try:
            for name in ("a", "b"):
                await sender.ensure(QueueSpec(name))
            clock = asyncio.get_running_loop().time
            waiting = [
                asyncio.create_task(receiver.receive(name, wait_s=3 * POLL_S))
                for receiver, name in zip(receivers, ("a", "a", "b"), strict=True)
            ]
            await asyncio.sleep(0.2)
            assert [service.receives for service in services] == [1, 1, 1, 0]
            sent_s = clock()
            await sender.send("a", [Outgoing("one"), Outgoing("two")])
            await asyncio.wait(waiting, timeout=POLL_S / 2, return_when=asyncio.FIRST_COMPLETED)
            assert clock() - sent_s < POLL_S / 2, "the regular poll has found the message"
            assert services[2].receives == 1
            bodies = [message.body for task in waiting for message in await task]
            assert sorted(bodies) == ["one", "two"]
        finally:
            for queue in (*receivers, sender):
                await queue.close()

    asyncio.run(run())


def test_sender_without_a_network_ignores_it() -> None:
    wakeups = NetworkWakeups("203.0.113.255")
    wakeups.close()
    wakeups.wake("a", 1)


def test_used_port_is_an_outage() -> None:
    wakeups = NetworkWakeups(LOOPBACK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        bell = wakeups.open("a")
        port = bell._socket.getsockname()[1]
        bell.close()
        other.bind(("", port))
        with pytest.raises(Unreachable, match=f"UDP port {port}"):
            wakeups.open("a")
    wakeups.close()


def test_address_is_that_of_the_grids_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    monkeypatch.delenv(METADATA_VARIABLE, raising=False)
    assert compose_deployment.broadcast_address(home) is None
    at = Deployment("batchlab-x", "10.213.70", "image", "1:1", "3.13")
    monkeypatch.setenv(METADATA_VARIABLE, at.metadata_url)
    assert compose_deployment.broadcast_address(home) == "10.213.70.255"
    monkeypatch.delenv(METADATA_VARIABLE)
    compose_deployment.write(home, at)
    assert compose_deployment.broadcast_address(home) == "10.213.70.255"
