"""The Auto Scaling semantics of ManagedFleet, by hand-set time over a launcher that is a table."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from batchlab.adapters.sim.launcher import MemoryState
from batchlab.adapters.state_file import StateFile
from batchlab.errors import BackendError, Refused
from batchlab.fleet.decisions import CRASH_LOOP
from batchlab.fleet.group import ManagedFleet
from batchlab.fleet.state import COUNTED, KEEP_ACTIVITIES, MOVES, Member
from batchlab.model import GroupView, Instance, LifecycleState, Pool
from tests.fleet_rigs import (
    CountedIds,
    ManualClock,
    TableLauncher,
    checked_in,
    counted,
    in_service,
    names,
)

POOL = Pool("p", max_size=4)
USER = "a user request"


class Crash(BaseException):
    """The manager dies here."""


class Disk(MemoryState):
    """A store that may be full."""

    full = False

    def save(self, data: bytes) -> None:
        if self.full:
            raise BackendError("no space left on device")
        super().save(data)


@dataclass
class World:
    """A fleet whose parts a test can reach; `restart` is a crash of the manager."""

    launcher: TableLauncher = field(default_factory=TableLauncher)
    clock: ManualClock = field(default_factory=ManualClock)
    ids: CountedIds = field(default_factory=CountedIds)
    store: Disk = field(default_factory=Disk)
    fleet: ManagedFleet = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.fleet = ManagedFleet(self.launcher, self.clock, self.ids, self.store)

    async def tick(self, after_s: float = 0.0) -> list[Instance]:
        self.clock.time_s += after_s
        return list(await self.fleet.tick())

    async def view(self) -> GroupView:
        return next(iter(await self.fleet.describe()))

    async def launch(self, size: int, *, ready: bool = True, pool: Pool = POOL) -> list[str]:
        """Ids of the group's counted instances once `size` were asked for."""
        await self.fleet.ensure(pool)
        await self.fleet.set_desired(pool.name, size, cause=USER)
        await self.fleet.tick()
        chosen = counted(await self.view())
        for name in chosen if ready else []:
            await self.fleet.ready(name)
        return chosen

    async def states(self) -> list[str]:
        return [str(instance.state) for instance in (await self.view()).instances]

    async def causes(self) -> list[str]:
        return [a.cause for a in await self.fleet.activities(limit=1_000)]


in_a_world = checked_in(World)


# --- States ---------------------------------------------------------------------------------------


def test_the_table_of_moves_lets_every_state_but_the_last_be_left() -> None:
    assert set(MOVES) == set(LifecycleState)
    assert [state for state, after in MOVES.items() if not after] == [LifecycleState.TERMINATED]


@pytest.mark.parametrize("before", list(LifecycleState))
def test_a_member_moves_only_as_the_table_says(before: LifecycleState) -> None:
    for after in LifecycleState:
        member = Member(Instance("w", "p", before, 0.0), launch=1)
        if after in MOVES[before]:
            member.move(after, note="")
            assert member.state is after
        else:
            with pytest.raises(ValueError, match="cannot go from"):
                member.move(after, note="")


@in_a_world
async def test_an_instance_is_in_service_once_it_runs_and_its_worker_reported(w: World) -> None:
    first, second = await w.launch(2, ready=False)
    await w.tick()
    assert await w.states() == ["Pending", "Pending"]
    await w.fleet.ready(second)
    await w.fleet.ready(second)
    assert in_service(await w.view()) == [second]
    launches = [a for a in await w.fleet.activities("p") if a.description.startswith("Launching")]
    assert {a.description[-6:]: a.status for a in launches} == {
        first: "InProgress",
        second: "Successful",
    }


@in_a_world
async def test_a_heartbeat_during_the_launch_is_not_lost(w: World) -> None:
    async def reports_before_launch_returns(instance: str) -> None:
        await w.fleet.ready(instance)
        assert await w.states() == ["Pending"]

    w.launcher.on_launch = reports_before_launch_returns
    await w.launch(1, ready=False)
    assert await w.states() == ["InService"]


@in_a_world
async def test_a_heartbeat_that_comes_too_late_changes_nothing(w: World) -> None:
    (name,) = await w.launch(1)
    await w.fleet.set_desired("p", 0, cause=USER)
    await w.fleet.ready(name)
    await w.fleet.ready("w-unknown")
    assert await w.states() == ["Terminating"]


@in_a_world
async def test_a_terminated_instance_is_listed_for_a_minute(w: World) -> None:
    await w.launch(1)
    await w.fleet.set_desired("p", 0, cause=USER)
    await w.tick()
    (dead,) = await w.tick()
    assert dead.note == "terminated: scale-in (exit 0)"
    await w.tick(60.0)
    assert await w.states() == ["Terminated"]
    await w.tick(0.1)
    assert await w.states() == []


# --- Scale-in and termination ---------------------------------------------------------------------


@in_a_world
async def test_scale_in_takes_pending_ones_first_and_then_the_newest(w: World) -> None:
    old, new, pending, newest = await w.launch(4, ready=False)
    for name in (old, new, newest):
        await w.fleet.ready(name)
    left = []
    for desired in (3, 2, 1, 0):
        await w.fleet.set_desired("p", desired, cause=USER)
        left.append(counted(await w.view()))
    assert left == [[old, new, newest], [old, new], [old], []]
    cancelled = [a.description for a in await w.fleet.activities("p") if a.status == "Cancelled"]
    assert cancelled == [f"Launching a new instance: {pending}"]


@in_a_world
async def test_the_launcher_is_asked_once_and_with_the_grace(w: World) -> None:
    (name,) = await w.launch(1)
    w.launcher.deaf = True
    await w.fleet.set_desired("p", 0, cause=USER)
    for _ in range(3):
        await w.tick(1.0)
    assert w.launcher.terminated == [(name, 30.0)]
    assert await w.states() == ["Terminating"]


@in_a_world
async def test_a_request_that_is_refused_leaves_no_trace(w: World) -> None:
    first, second = await w.launch(2, pool=replace(POOL, min_size=1))
    before = await w.view(), await w.causes()
    with pytest.raises(Refused, match="below its min of 1"):
        await w.fleet.terminate("p", [first, second], decrement=True, cause=USER)
    assert (await w.view(), await w.causes()) == before


@in_a_world
async def test_one_termination_that_fails_stops_no_other_and_is_tried_again(w: World) -> None:
    first, second = await w.launch(2)
    down = True

    async def fails_for_the_first(instance: str) -> None:
        if down and instance == first:
            raise BackendError("the engine does not answer")
        for _ in range(10):
            await asyncio.sleep(0)

    w.launcher.on_terminate = fails_for_the_first
    await w.fleet.set_desired("p", 0, cause=USER)
    with pytest.raises(BackendError, match="does not answer"):
        await w.tick()
    assert [name for name, _ in w.launcher.terminated] == [second]
    down = False
    assert names(await w.tick()) == [second]
    assert names(await w.tick()) == [first]


@in_a_world
async def test_an_instance_named_while_it_is_launched_is_ended_at_the_next_tick(w: World) -> None:
    async def scaled_in_meanwhile(_: str) -> None:
        await w.fleet.set_desired("p", 0, cause=USER)

    w.launcher.on_launch = scaled_in_meanwhile
    await w.launch(1, ready=False)
    assert await w.states() == ["Terminating"]
    await w.tick()
    assert len(await w.tick()) == 1
    assert w.launcher.launched == [name for name, _ in w.launcher.terminated]


@in_a_world
async def test_a_launch_that_fails_after_it_was_scaled_in_is_no_failure(w: World) -> None:
    async def scaled_in_and_failed(_: str) -> None:
        await w.fleet.set_desired("p", 0, cause=USER)
        raise BackendError("no answer in time")

    w.launcher.on_launch = scaled_in_and_failed
    await w.launch(1, ready=False)
    (instance,) = (await w.view()).instances
    assert (str(instance.state), instance.note) == ("Terminated", "terminated: scale-in")


@in_a_world
async def test_protection_that_outlasts_lowered_limits_ends_with_its_release(w: World) -> None:
    """I5: the excess goes at once, not with the next tick."""
    chosen = await w.launch(4)
    await w.fleet.protect("p", chosen, on=True)
    await w.fleet.ensure(replace(POOL, max_size=1))
    assert counted(await w.view()) == chosen
    await w.fleet.protect("p", chosen[:2], on=False)
    assert counted(await w.view()) == chosen[2:]


# --- Health ---------------------------------------------------------------------------------------


@in_a_world
async def test_an_instance_that_never_reports_is_replaced_after_the_grace(w: World) -> None:
    """Pain 1: an instance that hangs at its start must not count for ever."""
    (silent,) = await w.launch(1, ready=False)
    await w.tick(60.0)
    assert await w.states() == ["Pending"]
    await w.tick(0.1)
    assert await w.states() == ["Terminating", "Pending"]
    (dead,) = await w.tick()
    assert dead.id == silent
    assert dead.note == "terminated: no heartbeat within 60 s of its launch (exit 0)"
    told = {a.description: (a.status, a.cause) for a in await w.fleet.activities("p")}
    assert told[f"Launching a new instance: {silent}"][0] == "Failed"
    assert told[f"Terminating instance: {silent}"] == (
        "Successful",
        "an instance was taken out of service in response to a health check:"
        " no heartbeat within 60 s of its launch",
    )


@in_a_world
async def test_a_pool_that_boots_slowly_has_its_boot_time_on_top(w: World) -> None:
    await w.launch(1, ready=False, pool=replace(POOL, boot_s=90.0))
    await w.tick(150.0)
    assert await w.states() == ["Pending"]


@in_a_world
async def test_a_restarted_manager_gives_the_grace_anew(w: World) -> None:
    (name,) = await w.launch(1, ready=False)
    w.clock.time_s += 3_600
    w.restart()
    await w.tick()
    await w.fleet.ready(name)
    assert in_service(await w.view()) == [name]


@in_a_world
async def test_an_instance_that_no_launcher_knows_is_replaced(w: World) -> None:
    (name,) = await w.launch(1)
    del w.launcher.known[name]
    (dead,) = await w.tick()
    assert (dead.id, dead.note) == (name, "its launcher does not know it")
    assert await w.states() == ["Terminated", "Pending"]


@in_a_world
async def test_an_unhealthy_instance_is_drained_while_its_successor_starts(w: World) -> None:
    (name,) = await w.launch(1)
    await w.fleet.set_health(name, healthy=False, cause="silent for 90 s")
    await w.fleet.set_health(name, healthy=True, cause="it came back")
    assert [i.healthy for i in (await w.view()).instances] == [False]
    await w.tick()
    assert await w.states() == ["Terminating", "Pending"]
    assert w.launcher.terminated == [(name, 30.0)]


# --- Crash loops ----------------------------------------------------------------------------------


async def _crash_all(w: World, how: str) -> None:
    for name in counted(await w.view()):
        w.launcher.crash(name, how)


@in_a_world
async def test_a_crash_loop_is_slowed_down_and_says_why(w: World) -> None:
    """Pains 1 and 9: a fleet that starts workers in a loop for ever, and no one can tell why."""
    await w.launch(1, ready=False)
    launched_at_s = []
    for _ in range(2_400):
        before = len(w.launcher.launched)
        await _crash_all(w, "exit 1")
        await w.tick(0.1)
        if len(w.launcher.launched) > before:
            launched_at_s.append(w.clock.time_s)
        assert any("exit 1" in i.note for i in (await w.view()).instances), "always in sight"
    gaps = [round(b - a) for a, b in pairwise(launched_at_s)]
    assert gaps == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    await w.tick(60.0)
    (pending,) = [i for i in (await w.view()).instances if i.state in COUNTED]
    assert pending.note == "the last 11 ended before they were ready: exit 1"
    (newest, *_) = [a for a in await w.fleet.activities("p") if a.description.startswith("Wait")]
    assert newest.description == "Waiting 60 s before the next launch"
    assert newest.cause == "11 instances in a row ended before they were ready, the last: exit 1"
    assert newest.status == "Failed"


@in_a_world
async def test_an_instance_that_got_ready_ends_the_crash_loop(w: World) -> None:
    await w.launch(3, ready=False)
    await _crash_all(w, "exit 1")
    await w.tick()
    assert counted(await w.view()) == []
    await w.tick(1.1)
    (probe,) = counted(await w.view())
    await w.tick(20.0)
    assert counted(await w.view()) == [probe], "one probe at a time"
    await w.fleet.ready(probe)
    await w.tick()
    assert len(counted(await w.view())) == 3


@in_a_world
async def test_workers_that_die_at_work_make_no_crash_loop(w: World) -> None:
    """Pain 10: capacity lost to faults comes back at once."""
    await w.launch(2)
    for _ in range(2 * CRASH_LOOP):
        await _crash_all(w, "exit -9")
        await w.tick()
        assert len(counted(await w.view())) == 2
        for name in counted(await w.view()):
            await w.fleet.ready(name)


@in_a_world
async def test_a_launch_that_fails_is_tried_again_and_says_why(w: World) -> None:
    """Pain 1: AWS reports no capacity, and nobody is told."""
    w.launcher.refuse = "no capacity in this zone"
    await w.launch(1, ready=False)
    (failed,) = (await w.view()).instances
    assert failed.state is LifecycleState.TERMINATED
    assert failed.note == "its launch failed: no capacity in this zone"
    (activity,) = [a for a in await w.fleet.activities("p") if a.status == "Failed"]
    assert activity.cause.endswith("; its launch failed: no capacity in this zone")
    w.launcher.refuse = ""
    await w.tick(0.1)
    assert await w.states() == ["Terminated", "Pending"]


@in_a_world
async def test_a_changed_pool_is_tried_at_once_whatever_was_before(w: World) -> None:
    await w.launch(3, ready=False)
    await _crash_all(w, "exit 1")
    await w.tick()
    assert counted(await w.view()) == []
    await w.fleet.ensure(replace(POOL, env=(("LEVEL", "2"),)))
    await w.tick()
    assert len(counted(await w.view())) == 3


# --- A manager that crashes -----------------------------------------------------------------------


@in_a_world
async def test_a_restarted_manager_goes_on_where_it_was(w: World) -> None:
    chosen = await w.launch(3)
    await w.tick()
    await w.fleet.protect("p", chosen[:1], on=True)
    await w.tick()
    before = await w.view(), await w.fleet.activities()
    w.restart()
    assert (await w.view(), await w.fleet.activities()) == before
    assert await w.tick() == []
    assert (await w.view(), await w.fleet.activities()) == before
    assert w.launcher.launched == chosen


@in_a_world
async def test_a_death_in_the_managers_absence_is_reported_and_mended(w: World) -> None:
    chosen = await w.launch(2)
    w.launcher.crash(chosen[0], "exited while the manager was away")
    w.restart()
    assert names(await w.tick()) == chosen[:1]
    assert len(counted(await w.view())) == 2


@in_a_world
async def test_a_death_is_reported_again_to_a_manager_that_may_have_missed_it(w: World) -> None:
    (name,) = await w.launch(1)
    w.launcher.crash(name)
    assert names(await w.tick()) == [name]
    assert await w.tick() == []
    w.restart()
    assert names(await w.tick()) == [name]
    assert await w.tick() == []


@in_a_world
async def test_no_instance_runs_that_the_saved_state_does_not_know(w: World) -> None:
    """Pain 11: orphans after the head died. A crash at any moment of the launch loses nobody."""

    async def dies(_: str) -> None:
        # The launches of a tick go out together, so the others are made to be lost.
        for name in w.launcher.launched[2:]:
            w.launcher.known.pop(name, None)
        raise Crash

    w.launcher.on_launch = dies
    await w.fleet.ensure(POOL)
    await w.fleet.set_desired("p", 4, cause=USER)
    with pytest.raises(BaseExceptionGroup) as crash:
        await w.tick()
    assert crash.group_contains(Crash)
    w.launcher.on_launch = TableLauncher.on_launch
    w.restart()
    await w.tick()
    assert w.launcher.terminated == []
    assert len(counted(await w.view())) == 4
    living = [name for name, how in w.launcher.known.items() if how is None]
    assert sorted(living) == sorted(counted(await w.view()))


@in_a_world
async def test_an_instance_that_was_draining_is_asked_again_after_a_restart(w: World) -> None:
    """Its kill timer died with the manager, so without this it could drain for ever."""
    (name,) = await w.launch(1)
    w.launcher.deaf = True
    await w.fleet.set_desired("p", 0, cause=USER)
    await w.tick()
    w.restart()
    await w.tick()
    assert w.launcher.terminated == [(name, 30.0)] * 2


@in_a_world
async def test_an_orphan_is_terminated_once_and_noted(w: World) -> None:
    """Pain 11: instances that nobody knows and everybody pays."""
    w.launcher.known["w-stranger"] = None
    w.launcher.deaf = True
    await w.launch(1)
    await w.tick()
    assert [name for name, _ in w.launcher.terminated] == ["w-stranger"]
    (activity,) = await w.fleet.activities("")
    assert activity.description == "Terminating orphaned instance: w-stranger"
    assert len(counted(await w.view())) == 1


@in_a_world
async def test_what_a_failed_launch_left_behind_is_terminated(w: World) -> None:
    async def times_out(_: str) -> None:
        raise BackendError("no answer in time")

    w.launcher.on_launch = times_out
    assert await w.launch(1) == []
    (zombie,) = w.launcher.launched
    w.launcher.on_launch = TableLauncher.on_launch
    await w.tick()
    assert [name for name, _ in w.launcher.terminated] == [zombie]
    assert len(counted(await w.view())) == 1


@in_a_world
async def test_nothing_is_launched_that_could_not_be_saved(w: World) -> None:
    await w.fleet.ensure(POOL)
    await w.fleet.set_desired("p", 2, cause=USER)
    w.store.full = True
    with pytest.raises(BackendError, match="no space"):
        await w.tick()
    assert w.launcher.launched == []


@in_a_world
async def test_a_quiet_tick_writes_nothing(w: World) -> None:
    await w.launch(2)
    await w.tick()
    before = w.store.load()
    await w.tick(10.0)
    assert w.store.load() is before


@in_a_world
async def test_the_last_200_activities_of_each_pool_are_kept(w: World) -> None:
    other = replace(POOL, name="other")
    await w.fleet.ensure(other)
    await w.fleet.ensure(POOL)
    for n in range(300):
        await w.fleet.set_desired("p", n % 2, cause=f"request {n}")
    w.restart()
    kept = await w.fleet.activities("p", limit=1_000)
    assert len(kept) == KEEP_ACTIVITIES
    assert len(await w.fleet.activities("other")) == 1
    await w.fleet.set_desired("p", 0, cause="one more")
    (newest,) = await w.fleet.activities("p", limit=1)
    assert newest.id == kept[0].id + 1


def test_a_state_file_holds_what_was_saved_last(tmp_path: Path) -> None:
    store = StateFile(tmp_path / "fleet" / "state.json")
    assert store.load() is None
    store.save(b"one")
    store.save(b"two")
    assert StateFile(tmp_path / "fleet" / "state.json").load() == b"two"
    assert [path.name for path in (tmp_path / "fleet").iterdir()] == ["state.json"]


def test_a_state_file_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()
    store = StateFile(tmp_path / "state.json")
    with pytest.raises(BackendError, match="cannot be read"):
        store.load()
    with pytest.raises(BackendError, match="cannot be written"):
        store.save(b"x")


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"format": 99}'])
def test_a_state_that_cannot_be_understood_is_not_taken_for_an_empty_one(data: bytes) -> None:
    store = MemoryState()
    store.save(data)
    with pytest.raises(BackendError, match="saved state cannot be read"):
        ManagedFleet(TableLauncher(), ManualClock(), CountedIds(), store)


# --- I5 over random histories ---------------------------------------------------------------------


def _check_i5(view: GroupView) -> None:
    """Desired within limits; more than max only where protection holds every single one."""
    active = [i for i in view.instances if i.state in COUNTED]
    assert view.pool.min_size <= view.desired <= view.pool.max_size
    assert len(active) <= view.pool.max_size or all(i.protected for i in active)


async def _random_step(w: World, rng: Random) -> None:
    view = await w.view()
    some = rng.sample(view.instances, k=min(len(view.instances), rng.randint(0, 3)))
    chosen = [instance.id for instance in some]
    match rng.randrange(10):
        case 0:
            await w.fleet.set_desired("p", rng.randint(-1, 9), cause=USER)
        case 1:
            on = rng.random() < 0.5
            await w.fleet.terminate("p", chosen, decrement=on, cause=USER)
        case 2:
            for name in chosen:
                w.launcher.known[name] = w.launcher.known.get(name) or "exit -9"
        case 3:
            await w.fleet.protect("p", chosen, on=rng.random() < 0.6)
        case 4:
            low = rng.randint(0, 4)
            await w.fleet.ensure(replace(POOL, min_size=low, max_size=low + rng.randint(0, 5)))
        case 5:
            w.restart()
        case 6:
            w.launcher.refuse = rng.choice(["", "", "no capacity"])
            w.launcher.deaf = rng.random() < 0.3
        case 7:
            for name in chosen:
                await w.fleet.set_health(name, healthy=rng.random() < 0.3, cause="a whim")
        case _:
            for name in chosen:
                await w.fleet.ready(name)
            await w.tick(rng.choice([0.0, 0.5, 5.0, 70.0]))


async def _settle(w: World) -> None:
    """Faults cease, every worker reports: the group must come to what is wanted."""
    w.launcher.refuse, w.launcher.deaf = "", False
    for name, how in w.launcher.known.items():
        # Those that did not listen have been killed by their launcher meanwhile.
        if how is None and any(name == asked for asked, _ in w.launcher.terminated):
            w.launcher.known[name] = "exit -9"
    for _ in range(8):
        await w.fleet.protect("p", in_service(await w.view()), on=False)
        await w.tick(61.0)
        for name in counted(await w.view()):
            await w.fleet.ready(name)


@pytest.mark.parametrize("block", range(8))
def test_the_limits_hold_and_the_group_converges_whatever_happens(block: int) -> None:
    """I5, over 200 random histories of requests, faults and restarts."""

    async def history(seed: int) -> None:
        rng, w = Random(seed), World()

        async def amid_a_tick(_: str) -> None:
            _check_i5(await w.view())

        w.launcher.on_launch = w.launcher.on_terminate = amid_a_tick
        await w.fleet.ensure(replace(POOL, min_size=rng.randint(0, 2), max_size=rng.randint(2, 6)))
        for _ in range(60):
            with suppress(Refused):
                await _random_step(w, rng)
            _check_i5(await w.view())
        await _settle(w)
        view = await w.view()
        _check_i5(view)
        living = [name for name, how in w.launcher.known.items() if how is None]
        assert len(in_service(view)) == view.desired
        assert sorted(living) == sorted(in_service(view)), "nothing else runs"

    for seed in range(block * 25, block * 25 + 25):
        asyncio.run(history(seed))
