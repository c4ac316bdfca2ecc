"""The answers of a child process, which are gathered if they arrive quickly and read at once otherwise."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.worker.child_process import ChildProcess


class Pipe(ChildProcess):
    """The worker's end of a fake child process, whose output lines the test adds."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._read_s = 0.0
        self._eof = self.corrupted = False
        self.coming: list[bytes] = []
        self.waits: list[float] = []

    def _read(self) -> bool:
        if not self.coming:
            return False
        self._buffer += self.coming.pop(0)
        return True

    async def _readable(self, wait_s: float) -> None:
        self.waits.append(wait_s)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []

    async def sleep(delay_s: float) -> None:
        found.append(delay_s)

    monkeypatch.setattr("batchlab.worker.child_process.asyncio.sleep", sleep)
    return found


def test_following_answers_are_batched(slept: list[float]) -> None:
    async def main() -> None:
        pipe = Pipe()
        pipe.coming = [b'["ok",0,0.005,null,null]\n', b'["ok",1,0.005,null,null]\n']
        assert len(await pipe.answers(0.02, gather_s=0.02)) == 1
        assert len(await pipe.answers(0.02, gather_s=0.02)) == 1
        assert len(slept) == 1
        assert 0 < slept[0] <= 0.02

    asyncio.run(main())


def test_after_a_look_that_found_nothing_nothing_is_slept_through(slept: list[float]) -> None:
    """With tasks of a tenth of a second, the end of their bundle was noticed 20 ms late before."""

    async def main() -> None:
        pipe = Pipe()
        for _ in range(3):
            assert await pipe.answers(0.02, gather_s=0.02) == []
        pipe.coming = [b'["ok",0,0.1,null,null]\n["end","done"]\n']
        assert len(await pipe.answers(0.02, gather_s=0.02)) == 2
        assert slept == []
        assert pipe.waits == [0.02] * 3

    asyncio.run(main())
