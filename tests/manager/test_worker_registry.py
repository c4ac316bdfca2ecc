"""The manager's table of workers, and the removal of workers that no longer report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.sql import open_memory
from batchlab.core.errors import BatchlabError, Refused, Unreachable
from batchlab.core.model import BundleId, Instance, JobId, LifecycleState, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Fleet, Queue
from batchlab.core.protocol.messages import Beat, CounterReport, HeldBundle
from batchlab.manager.counters import DUPLICATE, Counters
from batchlab.manager.live_jobs import LiveJobs
from batchlab.manager.state import Ports
from batchlab.manager.worker_registry import LOST_S, WorkerRegistry
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from tests.support.no_fleet import NoFleet


def beat(instance: str, number: int) -> Beat:
    return Beat(f"w-{instance}", instance, "default", 1.0, 1, 0, (), number)


JOBS = frozenset({JobId("j-1")})
"""The jobs whose commit keys every worker has in these tests."""


def registry_of(ports: Ports) -> WorkerRegistry:
    registry = WorkerRegistry(ports, LiveJobs())
    names = ("i-1", "i-2", "i-gone", "i-here", "i-beats")
    there = {name: Instance(name, "default", LifecycleState.IN_SERVICE, 0.0) for name in names}
    registry.instances.update_instances(there)
    return registry


def dead(instance: str) -> Instance:
    return Instance(instance, "default", LifecycleState.TERMINATED, 0.0)


def ports(fleet: Fleet, queue: Queue = None) -> Ports:  # type: ignore[assignment]
    rng = random.Random(1)
    return Ports(
        SimObjects(),
        queue,
        fleet,
        open_memory(),
        SimClock(asyncio.get_running_loop(), 1_700_000_000.0),
        SimIds(rng),
        Patience(rng),
    )


def test_worker_whose_end_another_leader_recorded_is_forgotten() -> None:
    """Before, the worker counted as busy forever, and its jobs never counted as stalled."""

    async def main() -> None:
        registry = registry_of(ports(NoFleet()))
        for instance in ("i-gone", "i-here", "i-beats"):
            await registry.receive_beat(beat(instance, 1), JOBS)
        registry.forget_vanished({"i-here"})
        assert len(registry.workers) == 3, "the fleet may not tell of it yet"
        await asyncio.sleep(LOST_S + 1)
        await registry.receive_beat(beat("i-beats", 2), JOBS)
        registry.forget_vanished({"i-here"})
        assert set(registry.workers) == {"i-here", "i-beats"}
        # An old message of the worker that the queue delivers late does not bring the worker back.
        await registry.receive_beat(beat("i-gone", 2), JOBS)
        assert "i-gone" not in registry.workers
        assert registry.has_reported("i-gone")

    SimLoop().run(main())


def test_new_worker_on_an_ended_instance_is_accepted() -> None:
    """After a reboot of an instance, a new worker runs on the same instance. Before, the new worker was ignored, and
    its instance was replaced while it worked."""

    async def main() -> None:
        registry = registry_of(ports(NoFleet()))
        before = beat("i-1", 2)
        fresh = replace(before, worker="w-fresh", number=1)
        await registry.receive_beat(before, JOBS)
        await registry.receive_beat(replace(before, number=3, gone=True), JOBS)
        registry.readmit({"i-1"})
        await registry.receive_beat(before, JOBS)
        assert not registry.workers, "it has said that it goes"
        await registry.receive_beat(fresh, JOBS)
        # The queue may deliver a message of the old worker late.
        await registry.receive_beat(before, JOBS)
        await registry.receive_beat(replace(before, number=3, gone=True), JOBS)
        assert registry.workers["i-1"].beat == fresh
        await registry.release_messages([dead("i-1")])
        await registry.receive_beat(replace(fresh, number=2), JOBS)
        assert not registry.workers
        assert registry.has_reported("i-1")

    SimLoop().run(main())


@pytest.mark.parametrize("how", ["buried", "missed", "buried unheard"])
def test_instance_in_service_again_is_accepted_again(how: str) -> None:
    """An instance that returns from standby, or that one answer did not contain, still has its worker."""

    async def main() -> None:
        registry = registry_of(ports(NoFleet()))
        if how != "buried unheard":
            await registry.receive_beat(beat("i-1", 1), JOBS)
        if how == "missed":
            await asyncio.sleep(LOST_S + 1)
            registry.forget_vanished(())
        else:
            await registry.release_messages([dead("i-1")])
        registry.readmit({"i-2"})
        await registry.receive_beat(beat("i-1", 2), JOBS)
        assert not registry.workers
        registry.readmit({"i-1", "i-2"})
        await registry.receive_beat(beat("i-1", 3), JOBS)
        assert set(registry.workers) == {"i-1"}

    SimLoop().run(main())


@pytest.mark.parametrize(("silent_s", "given_back"), [(1.0, ["r-1"]), (LOST_S, [])])
def test_messages_of_a_long_silent_instance_are_not_released(silent_s: float, given_back: list[str]) -> None:
    """The messages had become visible by themselves, and other workers ran them, so a release would create copies."""

    async def main() -> None:
        returned: list[str] = []

        class Returning:
            async def change_visibility(self, _: str, receipts: Sequence[tuple[str, float]]) -> None:
                returned.extend(receipt for receipt, _ in receipts)

        registry = registry_of(ports(NoFleet(), Returning()))  # type: ignore[arg-type]
        held = HeldBundle("tasks-default", "r-1", JobId("j-1"), StageName("map"), BundleId("b-1"), True)
        await registry.receive_beat(replace(beat("i-1", 1), held=(held,)), JOBS)
        await asyncio.sleep(silent_s)
        await registry.release_messages([dead("i-1")])
        assert returned == given_back

    SimLoop().run(main())


@pytest.mark.parametrize("error", [Unreachable("It is away."), Refused("There is no such group.")])
def test_unreachable_group_is_notified_with_the_next_heartbeat(error: BatchlabError) -> None:
    """Before, the other content of the heartbeat was not counted, a refusal ended the manager, and the group was never
    notified."""

    async def main() -> None:
        told: list[str] = []

        class Moody(NoFleet):
            async def ready(self, instance: str) -> None:
                told.append(instance)
                if len(told) == 1:
                    raise error

        registry = registry_of(ports(Moody()))
        for number in range(1, 5):
            await registry.receive_beat(beat("i-1", number), JOBS)
        assert told == ["i-1"] * 2

    SimLoop().run(main())


def test_worker_that_still_reports_its_work_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.manager.counters.MAX_WORKERS", 3)
    counts = Counters()
    for n in range(1, 10):
        counts.record_worker_counts(CounterReport("w-first", {DUPLICATE: n}))
        counts.record_worker_counts(CounterReport(f"w-{n}", {DUPLICATE: 1}))
    assert counts.duplicates == 9 + 9
