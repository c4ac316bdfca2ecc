"""The deadline of pause and cancel: no task starts later than a lease after the write of the control object."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from batchlab.core.model import Control
from batchlab.sim.actors import Violated
from batchlab.sim.world import World
from batchlab.worker.job_cache import ControlPoller
from tests.support.sim.scenes import A, ended_well, in_world, job, stage, submitted, takes

MADE = job(stage(A, bundle=10), items=10)


async def _paused(world: World) -> None:
    await submitted(world, MADE)
    while not world.starts:
        await asyncio.sleep(0.5)
    await world.ask(lambda m: m.job_commands.pause(MADE.id), "pause")
    await asyncio.sleep(60.0)
    await world.ask(lambda m: m.job_commands.resume(MADE.id), "resume")
    await ended_well(world, MADE)


def test_a_pause_stops_a_bundle_that_runs() -> None:
    in_world(_paused, script=takes(3.0))


def test_watch_detects_a_pause_that_lets_a_bundle_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this planted bug, a worker obeys a cancellation at once, but a pause only between two bundles."""
    apply = ControlPoller._apply

    def heeds_no_pause(self: ControlPoller, name: Any, word: Control, until_s: float) -> None:
        apply(self, name, Control.RUN if word is Control.PAUSE else word, until_s)

    monkeypatch.setattr(ControlPoller, "_apply", heeds_no_pause)
    with pytest.raises(Violated, match="lease is violated"):
        in_world(_paused, script=takes(3.0))
