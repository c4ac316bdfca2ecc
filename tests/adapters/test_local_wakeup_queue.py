"""Receivers that wait at FIFOs."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import cast

import pytest

from batchlab.adapters.local.local_wakeup_queue import FifoWakeups, QueueService, WakeupFifo, WakeupQueue


class FullDisk(FifoWakeups):
    """Wakeups of a disk that is full after the first FIFO."""

    opened: WakeupFifo | None = None
    reused: int = -1

    def open(self, queue: str) -> WakeupFifo:
        if self.opened is None:
            self.opened = super().open(queue)
            return self.opened
        self.reused = os.open(os.devnull, os.O_RDONLY)
        raise OSError(errno.ENOSPC, "No space left on device")


class Empty:
    def __init__(self) -> None:
        self.polled = asyncio.Event()

    async def receive(self, queue: str, **_: object) -> tuple[()]:
        self.polled.set()
        return ()


def test_a_receiver_without_a_new_fifo_closes_its_old_one_once(tmp_path: Path) -> None:
    async def main() -> None:
        wakeups, service = FullDisk(tmp_path), Empty()
        queue = WakeupQueue(cast(QueueService, service), wakeups)
        receiving = asyncio.create_task(queue.receive("q", wait_s=20))
        await service.polled.wait()
        wakeups.wake("q", 1)
        with pytest.raises(OSError, match="No space left"):
            await receiving
        os.close(wakeups.reused)  # Another user of the number of the old descriptor.

    asyncio.run(main())
