"""The warm children of one worker, idle and busy.

Invariant: there are never more of them than slots, and a child only ever serves one code folder.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from batchlab.worker.child_process import ChildProcess


class Children:
    """Hands out one child per run."""

    def __init__(self, folder: Path, slots: int) -> None:
        """`folder` gets a small folder for each child."""
        self.closed = False
        self._folder = folder
        self._slots = slots
        self._idle: list[ChildProcess] = []
        self._busy: list[ChildProcess] = []
        self._started = 0
        self._quiet = asyncio.Event()

    async def take(self, digest: str, code: Path | None) -> ChildProcess:
        """A warm child for this code, else a fresh one. OSError where none can be started."""
        for child in reversed(self._idle):
            if child.digest == digest and not child.ended:
                self._idle.remove(child)
                self._busy.append(child)
                return child
        while self._idle and len(self._idle) + len(self._busy) >= self._slots:
            await self.bury(self._idle[0])
        self._started += 1
        place = self._folder / f"{os.getpid()}-{self._started}"
        child = ChildProcess(place, digest, code)
        self._busy.append(child)
        return child

    def give_back(self, child: ChildProcess) -> None:
        """It waits for its next request."""
        self._busy.remove(child)
        self._idle.append(child)
        self._tell()

    async def bury(self, child: ChildProcess) -> None:
        """End it, whatever it does."""
        for group in (self._idle, self._busy):
            if child in group:
                group.remove(child)
        await child.kill()
        child.close()
        self._tell()

    def _tell(self) -> None:
        if not self._busy:
            self._quiet.set()

    async def close(self) -> None:
        """End them all. Runs that are under way see `closed` and end as if they were killed."""
        self.closed = True
        while self._busy:
            self._quiet.clear()
            await self._quiet.wait()
        for child in tuple(self._idle):
            await self.bury(child)
