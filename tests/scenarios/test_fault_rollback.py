"""Rollback of faults in containers, at every cancellation and every failed call. Damage that remains is reported."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.docker.engine import Engine
from batchlab.core.errors import BackendError
from batchlab.runtime import compose_deployment, factory
from batchlab.runtime.home import Home, Place
from batchlab.scenarios.faults import proxy, target_grid
from batchlab.scenarios.faults.fault_injection import FaultInjector, injector_for
from batchlab.scenarios.faults.target_grid import EffectNotSeen, FaultResult, NothingHit, Rollback, RollbackFailed
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.scenarios.record import InjectedFault
from tests.support.docker.memory_engine import AT, DockerWorld
from tests.support.scenarios.cancelled_faults import Manager, at_every_wait

SHORT = 0.01


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_grid, "POLL_S", 0.001)
    monkeypatch.setattr(target_grid, "PAUSE_S", 0.001)
    monkeypatch.setattr(proxy, "_answers", lambda *_: True)


# --- The list of undos ----------------------------------------------------------------------------


def test_undo_runs_in_reverse_and_continues_after_an_error() -> None:
    done: list[str] = []

    def mend(name: str, *, fails: int = 0) -> Callable[[], Awaitable[None]]:
        left = [fails]

        async def undo() -> None:
            done.append(name)
            left[0] -= 1
            if left[0] >= 0:
                raise BackendError(f"{name} does not mend.")

        return undo

    async def go() -> None:
        async with Rollback(asyncio.Event()) as owed:
            owed.owe("the first", mend("1"))
            owed.owe("the second", mend("2", fails=9))
            owed.owe("the third", mend("3", fails=1))
            raise BackendError("It went wrong.")

    with pytest.raises(RollbackFailed) as told:
        asyncio.run(go())
    assert done == ["3", "3", "2", "2", "2", "1"]
    assert str(told.value) == ("It went wrong. The second could not be undone: 2 does not mend.")


def test_a_cancellation_waits_for_the_call_that_breaks_and_for_its_undo() -> None:
    said: list[str] = []

    async def slow(what: str) -> None:
        await asyncio.sleep(0.02)
        said.append(what)

    async def go() -> None:
        async def broken() -> None:
            async with Rollback(asyncio.Event()) as owed:
                await owed.breaking("it", lambda: slow("mended"), lambda: slow("broken"))

        doing = asyncio.ensure_future(broken())
        for _ in range(20):
            await asyncio.sleep(0.003)
            doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing

    asyncio.run(go())
    assert said == ["broken", "mended"]


def test_closed_loop_undoes_its_faults_first() -> None:
    """A second Ctrl-C closes the loop: it cancels all tasks, including those that undo faults."""
    said: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(0.01)
        said.append("mended")

    async def broken() -> None:
        async with Rollback(asyncio.Event()) as owed:
            owed.owe("it", slow)
            await asyncio.sleep(60)

    async def go() -> None:
        doing = asyncio.create_task(broken())
        await asyncio.sleep(0.01)
        doing.cancel()
        await asyncio.sleep(0.001)  # the undo is running now
        raise SystemExit(130)

    with pytest.raises(SystemExit):
        asyncio.run(go())
    assert said == ["mended"]


# --- Every fault, canceled at every wait ----------------------------------------------------------


def harm_of(name: FaultName) -> Callable[[DockerWorld], Coroutine[Any, Any, FaultResult]]:
    def do(world: DockerWorld) -> Coroutine[Any, Any, FaultResult]:
        there = world.there
        harm = {
            FaultName.PAUSE: there.pause,
            FaultName.PARTITION: there.partition,
            FaultName.S3_ERRORS: there.s3_errors,
            FaultName.MANAGER_CRASH: there.crash_manager,
        }[name]
        return harm(Fault(name, 0.0, for_s=SHORT))

    return do


IN_CONTAINERS = [FaultName.PAUSE, FaultName.PARTITION, FaultName.S3_ERRORS, FaultName.MANAGER_CRASH]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store the address of LocalStack in the home."""
    found = Place(f"http://{AT.subnet}.10:4566", "bucket", named=False)
    monkeypatch.setattr(factory.Backend, "place", lambda *_: found)


@pytest.mark.parametrize("name", IN_CONTAINERS)
def test_container_faults_are_undone_after_any_cancellation(name: FaultName, tmp_path: Path, place: None) -> None:
    assert at_every_wait(lambda: DockerWorld(tmp_path), harm_of(name)) > 5


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", IN_CONTAINERS)
def test_in_containers_nothing_stands_whichever_call_fails(
    name: FaultName, late: bool, tmp_path: Path, place: None
) -> None:
    for number in range(1, 60):
        world = DockerWorld(tmp_path, fails=number, late=late)
        try:
            asyncio.run(harm_of(name)(world))
        except RollbackFailed as error:
            raise AssertionError(f"call {number}") from error
        except (BackendError, NothingHit):
            pass
        assert world.stands() == [], f"call number {number} failed"
        if world.docker.calls < number:
            return
    raise AssertionError("it never came to its end")


def test_failed_undo_is_reported_and_blocks_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = DockerWorld(tmp_path)
    unpause = world.docker.unpause

    def broken(name: str) -> None:
        if name == "c-w-2":
            raise OSError("Docker has no memory")
        unpause(name)

    monkeypatch.setattr(world.docker, "unpause", broken)
    with pytest.raises(RollbackFailed, match=r"The pause of w-2 could not be undone: .* no memory"):
        asyncio.run(harm_of(FaultName.PAUSE)(world))
    assert world.stands() == ["c-w-2 is paused"]


# --- The injector ---------------------------------------------------------------------------------


def test_unexpected_error_is_reported_as_such(tmp_path: Path) -> None:
    async def nobody_sees(_: Fault) -> FaultResult:
        raise EffectNotSeen("The end of the instances was not seen within 60 s.")

    async def no_room(_: Fault) -> FaultResult:
        raise OSError(28, "No space left on device", "/there")

    async def go() -> list[InjectedFault]:
        there = target_grid.TargetGrid(factory.load("local"), Home(tmp_path), Manager("w-1"))
        one = FaultInjector(there, {FaultName.KILL: nobody_sees, FaultName.PAUSE: no_room})
        fault = Fault(FaultName.KILL, 0.0)
        found = [await one.inject(fault, 1.0), await one.inject(Fault(FaultName.PAUSE, 0.0), 1.5)]
        await one.undo()
        return [*found, await one.inject(fault, 2.0)]

    seen, refused, after = asyncio.run(go())
    assert "This machine refused it: [Errno 28] No space left on device" in refused.trouble
    assert (seen.impossible, seen.evidence) == ("", "")
    assert seen.trouble == "The end of the instances was not seen within 60 s."
    assert (after.impossible, after.trouble) == ("the run was over before", "")


def test_fault_on_the_same_target_waits_for_the_undo(tmp_path: Path) -> None:
    """The undo may take longer than the fault."""
    said: list[str] = []

    async def breaks(fault: Fault) -> FaultResult:
        said.append(f"{fault.pool} begins")
        async with Rollback(asyncio.Event()) as owed:
            owed.owe("it", lambda: asyncio.sleep(0.01))
            await asyncio.sleep(0)
        said.append(f"{fault.pool} ends")
        return FaultResult(("one",), "seen")

    async def go(name: FaultName, *pools: str) -> list[str]:
        said.clear()
        there = target_grid.TargetGrid(factory.load("local"), Home(tmp_path), Manager("w-1"))
        one = FaultInjector(there, {name: breaks})
        faults = [Fault(name, 0.0, pool=pool) for pool in pools]
        await asyncio.gather(*(one.inject(fault, 1.0) for fault in faults))
        return list(said)

    for name in (FaultName.S3_ERRORS, FaultName.ZONE_LOSS):
        told = asyncio.run(go(name, "a", "b", "c"))
        turns = [one.split()[0] for one in told]
        assert turns[::2] == turns[1::2], told
    assert asyncio.run(go(FaultName.PAUSE, "a", "b"))[:2] == ["a begins", "b begins"]
    assert asyncio.run(go(FaultName.PAUSE, "a", ""))[:2] == ["a begins", "a ends"]
    assert asyncio.run(go(FaultName.KILL, "a", "b"))[:2] == ["a begins", "b begins"]


@pytest.mark.parametrize("name", [FaultName.KILL, FaultName.PAUSE])
def test_nothing_is_broken_once_all_is_to_be_undone(tmp_path: Path, name: FaultName) -> None:
    """A fault that was about to begin must not begin either."""

    async def go() -> InjectedFault:
        world = DockerWorld(tmp_path)
        one = FaultInjector(world.scene, {name: getattr(world.there, name.value)})
        doing = asyncio.ensure_future(one.inject(Fault(name, 0.0), 1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await one.undo()
        assert world.stands() == []
        assert world.docker.calls <= 1
        return await doing

    assert asyncio.run(go()).impossible == "the run was over before"


def test_suspended_processes_are_resumed(tmp_path: Path) -> None:
    async def go() -> None:
        home = Home(tmp_path)
        compose_deployment.write(home, AT)
        closed: list[Engine] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "__exit__", lambda self, *_: closed.append(self))
            one = injector_for(factory.load("localstack"), home, Manager("w-1"))
            await one.close()
        assert len(closed) == 1

    asyncio.run(go())
