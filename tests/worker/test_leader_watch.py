"""The watch of the leader beat by a worker on an instance of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import Malformed, Unreachable
from batchlab.core.protocol import leader_beat, object_keys
from batchlab.core.protocol.leader_beat import UNLIMITED_ROUND_S, LeaderBeat
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.leader_watch import LeaderWatch

ORPHAN_S = 60.0


class Trial:
    """A leader beat, and the watch of one worker."""

    def __init__(self, loop: SimLoop) -> None:
        self.objects, self.clock = SimObjects(), SimClock(loop, 1.7e9)
        self.is_idle = True
        self.ended_s: float | None = None
        self._numbers = 0

    async def renew(self, orphan_s: float = ORPHAN_S) -> None:
        self._numbers += 1
        await self.objects.put(object_keys.LEADER, LeaderBeat("manager-1", self._numbers, orphan_s).to_bytes())

    async def renew_for(self, seconds: float) -> None:
        for _ in range(int(seconds / 10)):
            await self.renew()
            await asyncio.sleep(10)

    async def watch(self) -> None:
        await LeaderWatch(self.objects, self.clock).wait_until_orphaned(lambda: self.is_idle)
        self.ended_s = self.clock.monotonic_s()


def tried(check: Callable[[Trial], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        loop = SimLoop()

        async def main() -> None:
            trial = Trial(loop)
            watching = asyncio.create_task(trial.watch())
            await check(trial)
            watching.cancel()

        loop.run(main(), limit_s=100_000)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@tried
async def test_an_idle_worker_ends_some_time_after_the_last_beat(trial: Trial) -> None:
    await trial.renew_for(1_000)
    last_s = trial.clock.monotonic_s()
    assert trial.ended_s is None
    await asyncio.sleep(3 * ORPHAN_S)
    assert trial.ended_s is not None
    assert ORPHAN_S <= trial.ended_s - last_s <= 1.5 * ORPHAN_S


@tried
async def test_a_busy_worker_stays_until_it_is_idle(trial: Trial) -> None:
    trial.is_idle = False
    await trial.renew()
    await asyncio.sleep(10 * ORPHAN_S)
    assert trial.ended_s is None
    trial.is_idle = True
    await asyncio.sleep(ORPHAN_S)
    assert trial.ended_s is not None


@tried
async def test_without_a_beat_or_with_orphan_s_0_a_worker_stays(trial: Trial) -> None:
    await asyncio.sleep(10 * UNLIMITED_ROUND_S)
    await trial.renew(orphan_s=0.0)
    await asyncio.sleep(10 * UNLIMITED_ROUND_S)
    assert trial.ended_s is None


@tried
async def test_an_outage_of_the_bucket_does_not_count(trial: Trial) -> None:
    await trial.renew()
    await asyncio.sleep(10)
    original = trial.objects.get_if_changed

    async def fail(key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        raise Unreachable("The bucket does not respond.")

    trial.objects.get_if_changed = fail  # type: ignore[method-assign]
    await asyncio.sleep(10 * ORPHAN_S)
    trial.objects.get_if_changed = original  # type: ignore[method-assign]
    await asyncio.sleep(ORPHAN_S / 2)
    assert trial.ended_s is None
    await trial.renew_for(2 * ORPHAN_S)
    assert trial.ended_s is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"owner": "m", "number": 1}',
        b'{"owner": "m", "number": 1, "orphan_s": -1}',
        b'{"owner": "m", "number": 1, "orphan_s": 1e99}',
        b'{"owner": "m", "number": true, "orphan_s": 1}',
    ],
)
def test_a_malformed_beat_is_refused(content: bytes) -> None:
    with pytest.raises(Malformed):
        leader_beat.from_bytes(content)


def test_a_beat_is_read_as_it_was_written() -> None:
    beat = LeaderBeat("manager-1", 7, 1800.0)
    assert leader_beat.from_bytes(beat.to_bytes()) == beat
