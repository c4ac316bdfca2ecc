"""Reads of control objects, which renew the control leases of a worker's jobs."""

from __future__ import annotations

import asyncio
import random
from typing import cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import Unreachable
from batchlab.core.model import Bundle, Control, JobId, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Message, Queue
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.json_format import ControlCommand, control_to_bytes
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.service_settings import WorkerSettings
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.inflight_message import Identity, InflightMessage, WorkerContext
from batchlab.worker.job_cache import ControlPoller
from batchlab.worker.outbox import Outbox

JOB, STAGE = JobId("job"), StageName("a")
READ_S = 30.0


class Bucket(SimObjects):
    """A bucket that counts reads of control objects. The second read fails."""

    reads = 0

    async def get_if_changed(self, key: str, etag: str | None) -> tuple[bytes, str] | None:
        self.reads += 1
        if self.reads == 2:
            raise Unreachable("away")
        return await super().get_if_changed(key, etag)


@pytest.mark.parametrize(
    ("tasks", "has_started", "lease_s", "holds", "reads"),
    [(1, False, 1.0, True, 90), (2, True, 1.0, True, 90), (1, True, 1.0, False, 45), (2, True, 5.0, True, 10)],
)
def test_lease_of_a_job_holds_until_its_last_task_starts(
    tasks: int, has_started: bool, lease_s: float, holds: bool, reads: int
) -> None:
    """Before, the lease of a single task could end after one failed read while the worker fetched the task's code. The
    worker then returned the bundle to the queue."""

    async def main() -> None:
        objects, clock = Bucket(), SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        queue, patience = cast(Queue, None), Patience(random.Random(1))
        who, outbox = Identity("w-1", "i-1", "default", 1), Outbox(queue, patience)
        context = WorkerContext(who, objects, queue, clock, patience, WorkerSettings(control_lease_s=lease_s), outbox)
        bundle = Bundle(JOB, STAGE, TaskSet.span(0, tasks))
        message = Message("m", "", "r", 1, 0.0, 0.0)
        inflight = InflightMessage("q", message, TaskMessage(bundle), "w-1-1", 0.0, 0.0, "r", running=True)
        inflight.handle.running = 0 if has_started else None
        context.inflight[inflight.execution] = inflight
        await objects.put(object_keys.control(JOB), control_to_bytes(ControlCommand(Control.RUN)))
        controls = ControlPoller(context)
        polling = asyncio.create_task(controls.run())
        await asyncio.sleep(0.25)
        await controls.current(JOB)
        controls.watch(JOB)
        remaining_s: list[float] = []
        while clock.monotonic_s() < READ_S:
            await asyncio.sleep(0.01)
            remaining_s.append(inflight.handle.until_s - clock.monotonic_s())
        assert (min(remaining_s) > 0) is holds
        assert abs(objects.reads - reads) <= 2
        polling.cancel()

    SimLoop().run(main())
