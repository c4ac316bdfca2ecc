"""The contract of every Launcher adapter."""

from __future__ import annotations

import asyncio

import pytest

from batchlab.core.errors import AlreadyExists, BackendError
from tests.support.fleet import ABSENT, BROKEN, LAUNCHER_WORLDS, STEADY, STUBBORN, LauncherRig, everywhere

on_every_launcher = everywhere(LAUNCHER_WORLDS)


@on_every_launcher
async def test_no_instance_exists_before_the_first_launch(rig: LauncherRig) -> None:
    assert await rig.launcher.running() == {}


@on_every_launcher
async def test_a_launched_instance_lives(rig: LauncherRig) -> None:
    await rig.start(STEADY, "w-1")
    assert await rig.launcher.running() == {"w-1": None}


@on_every_launcher
async def test_instances_are_listed_in_order_of_launch(rig: LauncherRig) -> None:
    wanted = [f"w-{n}" for n in (3, 1, 4, 10, 5, 9, 2, 6)]
    for name in wanted:
        await rig.launcher.launch(STEADY, name)
    assert list(await rig.launcher.running()) == wanted


@on_every_launcher
async def test_an_id_is_used_once(rig: LauncherRig) -> None:
    await rig.start(STEADY, "w-1")
    with pytest.raises(AlreadyExists):
        await rig.launcher.launch(STEADY, "w-1")
    assert await rig.launcher.running() == {"w-1": None}


@on_every_launcher
async def test_failed_launch_gives_its_reason_and_leaves_no_instance(rig: LauncherRig) -> None:
    with pytest.raises(BackendError, match=r"no capacity|No such (file|image)|does not exist"):
        await rig.launcher.launch(ABSENT, "w-1")
    assert await rig.launcher.running() == {}
    await rig.start(STEADY, "w-1")


@on_every_launcher
async def test_terminated_instance_drains(rig: LauncherRig) -> None:
    await rig.start(STEADY, "w-1")
    await rig.launcher.terminate("w-1", grace_s=60.0)
    assert await rig.ended("w-1") == "exit 0"


@on_every_launcher
async def test_an_instance_that_does_not_drain_is_killed_after_the_grace(rig: LauncherRig) -> None:
    await rig.start(STUBBORN, "w-1")
    loop = asyncio.get_running_loop()
    asked_s = loop.time()
    await rig.launcher.terminate("w-1", grace_s=rig.moment_s)
    assert await rig.launcher.running() == {"w-1": None}, "terminate returns at once"
    assert await rig.ended("w-1") == "killed by SIGKILL, exit -9"
    assert rig.moment_s <= loop.time() - asked_s < rig.moment_s + 0.05 + rig.slack_s


@on_every_launcher
async def test_a_second_request_can_shorten_the_grace_but_not_lengthen_it(rig: LauncherRig) -> None:
    await rig.start(STUBBORN, "w-1")
    await rig.launcher.terminate("w-1", grace_s=3_000.0)
    await rig.launcher.terminate("w-1", grace_s=0.0)
    await rig.launcher.terminate("w-1", grace_s=3_000.0)
    assert await rig.ended("w-1") == "killed by SIGKILL, exit -9"


@on_every_launcher
async def test_terminating_what_ended_or_never_was_changes_nothing(rig: LauncherRig) -> None:
    await rig.start(STEADY, "w-1")
    await rig.launcher.terminate("w-1", grace_s=60.0)
    await rig.ended("w-1")
    await rig.launcher.terminate("w-1", grace_s=0.0)
    await rig.launcher.terminate("w-2", grace_s=0.0)
    assert await rig.launcher.running() == {"w-1": "exit 0"}


@on_every_launcher
async def test_instance_that_exits_reports_its_exit(rig: LauncherRig) -> None:
    await rig.launcher.launch(BROKEN, "w-1")
    assert await rig.ended("w-1") == "exit 3"


@on_every_launcher
async def test_killed_instance_reports_its_exit_and_wakes_waiters(rig: LauncherRig) -> None:
    await rig.start(STEADY, "w-1")
    await rig.start(STEADY, "w-2")
    rig.changed.clear()
    rig.crash("w-1")
    await asyncio.wait_for(rig.changed.wait(), timeout=5)
    assert await rig.launcher.running() == {"w-1": "killed by SIGKILL, exit -9", "w-2": None}


@on_every_launcher
async def test_end_of_an_instance_is_reported_until_it_was_read(rig: LauncherRig) -> None:
    await rig.launcher.launch(BROKEN, "w-1")
    await rig.ended("w-1")
    assert await rig.launcher.running() == {"w-1": "exit 3"}
    assert await rig.launcher.running() == {"w-1": "exit 3"}


@on_every_launcher
async def test_a_launch_does_not_wait_for_the_worker(rig: LauncherRig) -> None:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    for n in range(20):
        await rig.launcher.launch(STEADY, f"w-{n}")
    assert loop.time() - begun_s < 2.0 + rig.slack_s
