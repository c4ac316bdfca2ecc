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
from batchlab.core.protocol.json_format import ControlCommand, control_to_bytes, deleted_job
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.service_settings import WorkerSettings
from batchlab.sim.actors import SimClock
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.inflight_message import Identity, InflightMessage, WorkerContext
from batchlab.worker.job_cache import DEFINITION_LEASES, ControlPoller
from batchlab.worker.outbox import Outbox

JOB, STAGE = JobId("job"), StageName("a")
READ_S = 30.0


class Bucket(SimObjects):
    """A bucket that counts reads of control objects. The second and the third read fail."""

    reads = 0

    async def get_if_changed(self, key: str, etag: str | None, *, limit: int | None = None) -> tuple[bytes, str] | None:
        self.reads += 1
        if self.reads in (2, 3):
            raise Unreachable("away")
        return await super().get_if_changed(key, etag, limit=limit)


@pytest.mark.parametrize(
    ("tasks", "has_started", "holds", "reads"), [(1, False, True, 60), (2, True, True, 60), (1, True, False, 38)]
)
def test_lease_of_a_job_holds_until_its_last_task_starts(
    tasks: int, has_started: bool, holds: bool, reads: int
) -> None:
    """Before, the lease of a single task could end after a failed read while the worker fetched the task's code. The
    worker then returned the bundle to the queue."""

    async def main() -> None:
        objects, clock = Bucket(), SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        queue, patience = cast(Queue, None), Patience(random.Random(1))
        who, outbox = Identity("w-1", "i-1", "default", 1), Outbox(queue, patience)
        context = WorkerContext(who, objects, queue, clock, patience, WorkerSettings(control_lease_s=1.0), outbox)
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


class DefinedJob(SimObjects):
    """A bucket with a job's definition, which counts the checks of the definition."""

    checks = 0

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        self.checks += key == object_keys.spec(JOB)
        return await super().get(key, limit=limit)


async def _poller_of_a_defined_job() -> tuple[DefinedJob, ControlPoller]:
    objects, clock = DefinedJob(), SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
    queue, patience = cast(Queue, None), Patience(random.Random(1))
    who, outbox = Identity("w-1", "i-1", "default", 1), Outbox(queue, patience)
    context = WorkerContext(who, objects, queue, clock, patience, WorkerSettings(control_lease_s=1.0), outbox)
    await objects.put(object_keys.spec(JOB), b"{}")
    return objects, ControlPoller(context)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_worker_checks_the_definition_of_a_job_without_a_control_object_after_some_leases(is_deleted: bool) -> None:
    """The definition was removed, or a user has deleted the job."""

    async def main() -> None:
        objects, controls = await _poller_of_a_defined_job()
        assert (await controls.read(JOB, is_new=True))[0] is Control.RUN
        await objects.delete([object_keys.spec(JOB)])
        if is_deleted:
            await objects.put(object_keys.spec(JOB), deleted_job(JOB))
        for _ in range(DEFINITION_LEASES):
            await asyncio.sleep(1.0)
            assert (await controls.read(JOB))[0] is Control.RUN
        assert objects.checks == 0
        await asyncio.sleep(1.0)
        assert (await controls.read(JOB))[0] is Control.CANCEL
        assert objects.checks == 1

    SimLoop().run(main())


def test_worker_checks_the_definition_after_a_gap() -> None:
    """During the gap, the job may have been cancelled and removed, so no task may start (I4)."""

    async def main() -> None:
        objects, controls = await _poller_of_a_defined_job()
        assert (await controls.read(JOB, is_new=True))[0] is Control.RUN
        await objects.delete([object_keys.spec(JOB)])
        await asyncio.sleep(1.5)
        assert (await controls.read(JOB))[0] is Control.CANCEL

    SimLoop().run(main())
