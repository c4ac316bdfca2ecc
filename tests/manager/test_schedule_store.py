"""The schedules in the bucket: a manager does not overwrite the decision of another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from random import Random
from typing import Any, cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core import schedules
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import object_keys
from batchlab.core.schedules import Definition, Schedule, When
from batchlab.manager import scheduler
from batchlab.manager.scheduler import ScheduleStore
from batchlab.manager.state import Ports

SCHEDULE = Schedule(Definition("daily", "sums", When("0 2 * * *"), "grid/templates/x.json"), 1, 0, 0)


def with_ports(act: Callable[[Ports], Coroutine[Any, Any, None]]) -> None:
    nothing = cast(Any, None)
    patience = Patience(Random(1), limit_s=0.0)

    async def main() -> None:
        await act(Ports(SimObjects(), nothing, nothing, nothing, nothing, nothing, patience))

    asyncio.run(main())


def test_a_late_change_is_refused_although_the_schedule_is_as_it_was_again() -> None:
    """On S3, equal contents have equal ETags, but a late pause must not undo a resume."""

    async def act(ports: Ports) -> None:
        late, other = ScheduleStore(ports), ScheduleStore(ports)
        assert await other.put(SCHEDULE)
        await late.load()
        for paused in (True, False):
            assert await other.put(replace(other.schedules["daily"], paused=paused))
        assert not await late.put(replace(late.schedules["daily"], paused=True))
        assert late.schedules == {"daily": SCHEDULE}

    with_ports(act)


def test_a_schedule_that_is_too_large_does_not_block_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    data = schedules.to_bytes(SCHEDULE)
    monkeypatch.setattr(scheduler, "MAX_BYTES", len(data))

    async def act(ports: Ports) -> None:
        await ports.objects.put(object_keys.schedule("large"), data + b" ")
        await ports.objects.put(object_keys.schedule("daily"), data)
        store = ScheduleStore(ports)
        await store.load()
        assert store.schedules == {"daily": SCHEDULE}
        assert store.unreadable == {"large"}
        await ports.objects.put(object_keys.schedule("daily"), data + b" ")
        await store.read("daily")
        assert store.schedules == {}
        assert store.unreadable == {"daily", "large"}

    with_ports(act)
