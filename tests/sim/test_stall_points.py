"""Stall points. A leader is frozen during one of its calls, and the call takes effect after another manager has led."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core import ledger_projection
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Control, Failure, FailureKind, JobState
from batchlab.core.retry_rule import RetryRule
from batchlab.sim import invariants
from batchlab.sim.actors import SimulationError, Violated
from batchlab.sim.tasks import Script, ScriptedAttempt, value_of
from batchlab.sim.users import bring_items, few_items
from batchlab.sim.world import World
from tests.support.sim.scenes import A, B, C, job, stage, takes
from tests.support.sim.stall_points import After, Scene, Story

EVERY = os.environ.get("BATCHLAB_STALLS") == "all"
RARE = {f"ledger.{name}" for name in ("SetControl", "SetPlanned", "Reopen", "Finish")}
WRITES = {"objects.put", "queue.send", "ledger.MoveJob", "ledger.AddCut", "ledger.Fold"}
"""Calls that every test holds. Without BATCHLAB_STALLS=all, a test holds each rare call of its scene and one call of
each other kind."""


async def submit(world: World, made: JobDef) -> None:
    if (items := few_items(made)) is None:
        await bring_items(world, made)
    await world.ask(lambda m: m.job_commands.submit(made, items), "submit")


async def checked(world: World, *jobs: JobDef) -> None:
    await invariants.check_all(world, [one.id for one in jobs])
    for one in jobs:
        await invariants.check_results(world, one)


def later(world: World, verb: str, made: JobDef) -> asyncio.Task[None]:
    """Send the request, and repeat it if the manager dies. A cancel is sent only once, because a second one would be a
    request of its own. The runtime check records when a cancellation is acknowledged."""

    async def cancel() -> None:
        acknowledged = world.watch.controls.on_cancel_request(made.id)
        assert world.leader
        request = world.leader.actor.spawn(world.leader.manager.job_commands.cancel(made.id), name=verb)
        await asyncio.wait([request])
        if not request.cancelled() and request.exception() is None:
            acknowledged()

    async def ask() -> None:
        answered = world.watch.controls.on_retry_request(made.id) if verb == "retry" else None
        await world.ask(lambda m: getattr(m.job_commands, verb)(made.id), verb)
        if answered:
            answered()

    return asyncio.create_task(cancel() if verb == "cancel" else ask(), name=verb)


async def started(world: World, *, tasks: int = 1, round_: int = 0) -> None:
    while sum(start.round == round_ for start in world.watch.starts) < tasks:
        await asyncio.sleep(0.25)


def runs(made: JobDef, *, lands: str) -> Story:
    """A job from its submission to its end. The held call lands during the job, or after the job's end."""

    async def story(world: World, land: asyncio.Event) -> None:
        if lands == "early":
            land.set()
        await submit(world, made)
        await world.ended(made.id)
        land.set()
        await asyncio.sleep(20.0)
        await checked(world, made)

    return story


def retries(made: JobDef, *, stop: str) -> Story:
    """A job that ends, by its failures or by its user, and is retried. The held call lands while
    the second round runs."""

    async def story(world: World, land: asyncio.Event) -> None:
        await submit(world, made)
        asked = []
        if stop:
            await started(world, tasks=2)
            asked.append(later(world, stop, made))
        state = (await world.ended(made.id)).state
        if state is not JobState.SUCCEEDED:
            asked.append(later(world, "retry", made))
            while (await world.ledger.job(made.id)).round == 0:
                await asyncio.sleep(0.25)
                if len(asked) and asked[-1].done():
                    break
            await started(world, round_=1)
        land.set()
        for one in asked:
            await one
        if (state := (await world.ended(made.id)).state) is not JobState.SUCCEEDED:
            raise Violated(f"the job was retried last, and ended {state}")
        await asyncio.sleep(20.0)
        await checked(world, made)

    return story


def pauses(made: JobDef) -> Story:
    """A job that is paused and resumed. The held call lands after the job was resumed."""

    async def story(world: World, land: asyncio.Event) -> None:
        await submit(world, made)
        await started(world, tasks=2)
        asked = [later(world, "pause", made)]
        while (await world.ledger.job(made.id)).control is not Control.PAUSE:
            await asyncio.sleep(0.25)
            if asked[0].done():
                break
        await asyncio.sleep(10.0)
        asked.append(later(world, "resume", made))
        await asyncio.sleep(10.0)
        land.set()
        for one in asked:
            await one
        while not (record := await world.ledger.job(made.id)).state.ended:
            if record.control is Control.PAUSE:
                await later(world, "resume", made)
            await asyncio.sleep(2.0)
        await asyncio.sleep(20.0)
        await checked(world, made)

    return story


def fails_first(run_s: float) -> Script:
    """Every third task fails at its first attempt of the first round."""

    def play(scene: Any) -> ScriptedAttempt:
        first = scene.bundle.attempt == 1 and scene.bundle.round == 0
        if scene.stage.name == A and scene.task % 3 == 1 and first:
            failure = Failure(scene.task, FailureKind.EXCEPTION, "no luck", error="Luck")
            return ScriptedAttempt(run_s, failure=failure)
        return ScriptedAttempt(run_s, value_of(scene.stage.name, scene.item))

    return play


ONE = job(stage(A))
CHAIN = job(stage(A), stage(B, A), stage(C, B))
GATHER = job(stage(A), stage(B, A, gather="key"), stage(C, B, gather="*"))
AGAIN = job(stage(A, retry=RetryRule(attempts=2, backoff_s=5.0)), stage(B, A, gather="*"))
FAILS = job(stage(A, retry=RetryRule(attempts=1)), stage(B, A, gather="key"), stage(C, B), items=9)

SCENES: dict[str, Scene] = {
    "fast job": Scene(runs(ONE, lands="early"), takes(0.1)),
    "fast job, late": Scene(runs(ONE, lands="late"), takes(0.1)),
    "chain": Scene(runs(CHAIN, lands="late"), takes(2.0)),
    "gather": Scene(runs(GATHER, lands="late"), takes(2.0)),
    "backoff": Scene(runs(AGAIN, lands="early"), fails_first(2.0)),
    "retry": Scene(retries(FAILS, stop=""), fails_first(5.0)),
    "cancel": Scene(retries(job(stage(A), stage(B, A, gather="*")), stop="cancel"), takes(8.0)),
    "stop": Scene(retries(replace(FAILS, fail_fast=True), stop=""), fails_first(5.0)),
    "pause": Scene(pauses(job(stage(A), stage(B, A))), takes(8.0)),
}


def chosen(labels: list[str]) -> list[int]:
    """The numbers of the calls to hold."""
    if EVERY:
        return list(range(1, len(labels) + 1))
    calls = {label: [n for n, one in enumerate(labels, 1) if one == label] for label in WRITES}
    some = [numbers[len(numbers) // 2] for numbers in calls.values() if numbers]
    return sorted(some + [n for n, label in enumerate(labels, 1) if label in RARE])


def broken_by(scene: Scene, call: int, how: After) -> str:
    """Return the promise that breaks, or ""."""
    try:
        scene.replay(call, how)
    except SimulationError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_a_call_that_lands_late_breaks_no_promise(name: str) -> None:
    """Calls of a leader take effect after another manager has led.

    A message in transit cannot become a copy, so its late arrival may cost a second run of a bundle ("waste"). The
    first commit counts, so the second run breaks no promise.
    """
    labels = SCENES[name].calls()
    calls = chosen(labels)
    hows = list(After)
    found = {
        (call, how.name): broken
        for number, call in enumerate(calls)
        for how in (hows if EVERY else [hows[number % len(hows)]])
        if (broken := broken_by(SCENES[name], call, how))
        and not (labels[call - 1] == "queue.send" and broken.startswith("waste "))
    }
    assert not found, f"{len(found)} of {len(calls)} stall points"


# --- Coverage of the enumeration -----------------------------------------------------------------


def planned_in_any_round(patch: pytest.MonkeyPatch) -> None:
    real = ledger_projection.set_planned
    patch.setattr(ledger_projection, "set_planned", lambda p, c: real(p, replace(c, round=p.round)))


def controlled_in_any_round(patch: pytest.MonkeyPatch) -> None:
    real = ledger_projection.set_control
    patch.setattr(ledger_projection, "set_control", lambda p, c: real(p, replace(c, round=p.round)))


@pytest.mark.parametrize(
    ("plant", "name", "label"),
    [(planned_in_any_round, "retry", "ledger.SetPlanned"), (controlled_in_any_round, "cancel", "ledger.SetControl")],
)
def test_the_stall_points_show_a_write_that_is_not_fenced(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [n for n, one in enumerate(SCENES[name].calls(), 1) if one == label]
    plant(monkeypatch)
    assert any(broken_by(SCENES[name], call, After.DEPOSED) for call in calls)
