"""Planted bugs of the GPUs of instances.

Each docstring describes the code of the mutant, and names the promise that it breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace

from batchlab.core.job_definition import StageDef
from batchlab.core.model import Pool
from batchlab.fleet.engine import Engine
from batchlab.manager.autoscaler import capacity_for
from batchlab.manager.context import Context
from batchlab.manager.state import Backlog
from batchlab.worker.inflight_message import InflightMessage, Slots
from batchlab.worker.loop import Worker
from tests.sim.mutants.kit import Plant, planted


@planted("gpu", weather="gpus")
def gpu_given_to_two_tasks(plant: Plant) -> None:
    """A worker gives its first GPUs to each task. Two running tasks use one GPU (gpu)."""
    original = Slots.take

    @plant.method(Slots, "take")
    def take(self: Slots, request: asyncio.Future[bool]) -> tuple[int, ...]:
        return tuple(range(len(original(self, request))))


def _lose_gpus(plant: Plant, are_lost: Callable[[InflightMessage], object]) -> None:
    """Let workers lose the GPUs of the bundles for which `are_lost` returns a true value after the run."""
    original = Worker._run_tasks

    @plant.method(Worker, "_run_tasks")
    async def _run_tasks(self: Worker, inflight: InflightMessage, stage: StageDef) -> None:
        await original(self, inflight, stage)
        if are_lost(inflight):
            inflight.gpus = ()


@planted("gpu", weather="gpus")
def gpu_lost_with_a_killed_task(plant: Plant) -> None:
    """A worker does not take back the GPUs of a task that it has killed (gpu)."""
    _lose_gpus(plant, lambda inflight: inflight.handle.kill)


@planted("gpu", "I7", weather="gpus")
def gpu_lost_with_a_failed_task(plant: Plant) -> None:
    """A worker loses the GPUs of a bundle with a failed task. Later tasks wait forever for these GPUs (gpu, I7)."""
    _lose_gpus(plant, lambda inflight: any(ran.failure for ran in inflight.ran))


@planted("gpu", weather="gpus")
def task_runs_without_its_gpus(plant: Plant) -> None:
    """A worker runs a task that needs GPUs as soon as slots are free, and without a GPU (gpu)."""
    original = Slots.request

    @plant.method(Slots, "request")
    def request(self: Slots, count: int, gpus: int = 0) -> asyncio.Future[bool]:
        return original(self, count)


@planted("gpu", weather="gpus")
def gpus_ignored_by_the_autoscaler(plant: Plant) -> None:
    """The scaling policy counts only slots. The pool has fewer instances than its tasks with GPUs need (gpu)."""

    @plant.everywhere(capacity_for)
    def _capacity_for(backlog: Backlog, pool: Pool, drain_target_s: float) -> tuple[int, int]:
        return capacity_for(replace(backlog, gpu_s=0.0, gpu_tasks=0), pool, drain_target_s)


@planted("gpu", weather="gpus")
def more_bundles_than_gpus(plant: Plant) -> None:
    """The manager fills the window of a pool with bundles that need GPUs. Bundles hold places of workers while they
    wait for a GPU (gpu).
    """

    @plant.method(Context, "free_gpus")
    def free_gpus(self: Context, name: str) -> int:
        return 10**6


@planted("gpu", weather="gpus")
def gpus_of_an_ending_instance_given_away(plant: Plant) -> None:
    """The fleet of one machine launches an instance with GPUs while another instance with GPUs is ending. Two running
    tasks use one GPU (gpu).
    """

    @plant.method(Engine, "_uses_gpus")
    def _uses_gpus(self: Engine, instances: Mapping[str, str | None]) -> bool:
        return False
