"""The schedules in the bucket: a manager does not overwrite the decision of another one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import Any, cast

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.port_retries import Patience
from batchlab.core.schedules import Definition, Schedule, When
from batchlab.manager.scheduler import ScheduleStore
from batchlab.manager.state import Ports

SCHEDULE = Schedule(Definition("daily", "sums", When("0 2 * * *"), "grid/templates/x.json"), 1, 0, 0)


def test_a_late_change_is_refused_although_the_schedule_is_as_it_was_again() -> None:
    """On S3, equal contents have equal ETags, but a late pause must not undo a resume."""
    nothing = cast(Any, None)
    patience = Patience(Random(1), limit_s=0.0)
    ports = Ports(SimObjects(), nothing, nothing, nothing, nothing, nothing, patience)

    async def main() -> None:
        late, other = ScheduleStore(ports), ScheduleStore(ports)
        assert await other.put(SCHEDULE)
        await late.load()
        for paused in (True, False):
            assert await other.put(replace(other.schedules["daily"], paused=paused))
        assert not await late.put(replace(late.schedules["daily"], paused=True))
        assert late.schedules == {"daily": SCHEDULE}

    asyncio.run(main())
