"""The scaling policy: the number of instances for a backlog, and the instances to terminate (I5)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.model import GroupView, Instance, JobId, LifecycleState, Pool, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.core.service_settings import ManagerSettings
from batchlab.manager.autoscaler import Autoscaler, desired_capacity
from batchlab.manager.context import Context
from batchlab.manager.state import Backlog, Ports, WorkerStatus

POOL = Pool("default", min_size=1, max_size=10, slots=2)


def group(*ids: str, desired: int | None = None, pool: Pool = POOL) -> GroupView:
    alive = tuple(Instance(i, pool.name, LifecycleState.IN_SERVICE, 0.0) for i in ids)
    return GroupView(pool, len(ids) if desired is None else desired, alive)


@pytest.mark.parametrize(
    ("backlog", "desired"),
    [
        (Backlog(), 1),  # min
        (Backlog(seconds=0.001, tasks=1), 1),
        (Backlog(seconds=40.0, tasks=100), 2),  # 40 s of work in 10 s on 2 slots each
        (Backlog(seconds=41.0, tasks=100), 3),
        (Backlog(seconds=10_000.0, tasks=5000), 10),  # max
        (Backlog(seconds=10_000.0, tasks=3), 2),  # three tasks do not need more instances
        (Backlog(seconds=400.0, tasks=4, gpu_s=400.0, gpu_tasks=4), 4),  # a task on the GPU of each instance
        (Backlog(seconds=41.0, tasks=4, gpu_s=1.0, gpu_tasks=1), 2),
    ],
)
def test_desired_capacity_follows_seconds_of_backlog(backlog: Backlog, desired: int) -> None:
    found, why = desired_capacity(backlog, group("a", pool=replace(POOL, gpus=1)), drain_target_s=10.0)
    assert found == desired
    assert "backlog" in why


class Recorder:
    """A fake fleet and clock, which records the policy's calls."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.terminated: list[str] = []
        self.desired: list[int] = []
        self.protected: list[tuple[str, bool]] = []

    def monotonic_s(self) -> float:
        return self.now_s

    async def set_desired(self, _pool: str, desired: int, *, cause: str) -> None:
        assert cause
        self.desired.append(desired)

    async def terminate(self, _pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        assert decrement
        assert cause
        self.terminated += instances

    async def protect(self, _pool: str, instances: Sequence[str], *, on: bool) -> None:
        self.protected += [(i, on) for i in instances]


def scaler(recorder: Recorder, busy: Sequence[str], idle: Sequence[str]) -> Autoscaler:
    anything = cast(Any, recorder)
    patience = Patience(random.Random(1))
    ports = Ports(SimObjects(), anything, anything, anything, anything, anything, patience)
    context = Context(ports, ManagerSettings(idle_s=5.0))
    held = (HeldBundle("q", "r", JobId("j"), StageName("s"), cast(Any, "b"), True),)
    for name in [*busy, *idle]:
        holds = held if name in busy else ()
        beat = Beat(f"w-{name}", name, "default", 0.0, 2, len(holds), holds, 1)
        context.registry.workers[name] = WorkerStatus(beat, 0.0, {})
    return Autoscaler(context)


def test_only_idle_instances_are_named_for_scale_in_and_only_after_the_idle_time() -> None:
    recorder = Recorder()
    policy = scaler(recorder, busy=["b1", "b2"], idle=["i1"])
    view = group("b1", "i1", "b2")

    async def tick() -> None:
        await policy.scale(view)

    asyncio.run(tick())
    assert recorder.terminated == []
    recorder.now_s += 5.0
    asyncio.run(tick())
    assert recorder.terminated == ["i1"]  # two instances are surplus, but only one of them is idle
    assert recorder.desired == []


def test_busy_instances_are_protected_and_idle_ones_released() -> None:
    recorder = Recorder()
    policy = scaler(recorder, busy=["b1"], idle=["i1"])
    asyncio.run(policy.scale(group("b1", "i1")))
    assert recorder.protected == [("b1", True)]
    policy._registry.workers["b1"] = policy._registry.workers["i1"]
    told = group("b1", "i1")
    first, second = told.instances
    told = replace(told, instances=(replace(first, protected=True), second))
    asyncio.run(policy.scale(told))
    assert recorder.protected == [("b1", True), ("b1", False)]


def test_pool_held_by_hand_is_not_scaled() -> None:
    recorder = Recorder()
    policy = scaler(recorder, busy=[], idle=["i1", "i2"])
    policy.user_capacity["default"] = 2
    recorder.now_s += 1000.0
    asyncio.run(policy.scale(group("i1", "i2")))
    assert not recorder.terminated
    assert not recorder.desired
