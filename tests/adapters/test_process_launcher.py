"""Local instances as real processes: recycled pids, process groups, and a killed manager."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchlab.adapters.local import processes
from batchlab.adapters.local.processes import INSTANCE_VARIABLE, ProcessLauncher
from batchlab.adapters.local.state_files import StateFile
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import boot_id, start_mark
from batchlab.core.ports import KEEP_ENDED_S
from batchlab.fleet.fleet_port import ManagedFleet
from tests.support.fleet import (
    ABSENT,
    DEADLINE_S,
    STEADY,
    STUBBORN,
    CountedIds,
    LoopClock,
    ManualClock,
    counted,
    names,
    pid_of,
    process_launcher,
)
from tests.support.processes import environment, is_running, open_files

AWAY = "exited while no manager was running"

_MANAGER = """
import asyncio, os, signal, sys
from pathlib import Path
from batchlab.adapters.local.processes import ProcessLauncher
from batchlab.adapters.local.state_files import StateFile
from batchlab.core.errors import BackendError
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.core.model import Pool
from tests.support.fleet import STEADY, CountedIds, LoopClock, process_launcher

async def main(root, what):
    launcher = process_launcher(root)
    if what == "fleet":
        fleet = ManagedFleet(launcher, LoopClock(), CountedIds(), StateFile(root / "fleet.json"))
        await fleet.ensure(STEADY)
        await fleet.set_desired("steady", 2, cause="a user request")
        await fleet.tick()
    else:
        for name in what.split(","):
            await launcher.launch(Pool(name.partition("-")[0]), name)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


def killed_manager(root: Path, what: str) -> None:
    """Run a manager that launches instances (`steady-1,stubborn-2`, or a `fleet`), and kill it."""
    done = subprocess.run([sys.executable, "-c", _MANAGER, str(root), what], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def with_launcher(
    root: Path, check: Callable[[ProcessLauncher], Awaitable[None]], *, clock: ManualClock | None = None
) -> None:
    async def main() -> None:
        launcher = process_launcher(root, clock)
        try:
            await check(launcher)
        finally:
            await launcher.close(kill=True)

    asyncio.run(main())


def targets(pid: int) -> list[str]:
    """Return the open files of the process."""
    try:
        return sorted(str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return []  # the file was closed during the look


async def soon(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "never came about"
        await asyncio.sleep(0.005)


async def up(root: Path, *instances: str) -> None:
    logs = [root / "logs" / f"{instance}.log" for instance in instances]
    await soon(lambda: all(log.exists() and "up" in log.read_text() for log in logs))


async def end_of(launcher: ProcessLauncher, instance: str) -> str:
    while True:
        launcher.changed.clear()  # cleared before the look, so that a change during the look is not lost
        if (how := (await launcher.running())[instance]) is not None:
            return how
        await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)


@contextmanager
def stranger(env: dict[str, str] | None = None, *, leader: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that does not belong to a launcher."""
    with subprocess.Popen(["sleep", "100"], env=env, start_new_session=leader) as process:
        try:
            yield process
        finally:
            process.kill()


def write_record(root: Path, instance: str, **changes: object) -> None:
    """Write a record like one of an earlier manager, with the given changes."""
    record: dict[str, object] = {
        "instance": instance,
        "pool": "steady",
        "boot": boot_id(),
        "pid": 0,
        "start_ticks": 0,
        "ended": None,
    }
    (root / "instances").mkdir(parents=True, exist_ok=True)
    (root / "instances" / f"{instance}.json").write_text(json.dumps(record | changes))


def mark_of(pid: int) -> int:
    mark = start_mark(pid)
    assert mark is not None
    return mark


# --- Launch ---------------------------------------------------------------------------------------


def test_a_launch_that_fails_leaves_neither_record_nor_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a record could not be stopped."""
    pids = []

    def none_left(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    async def check(launcher: ProcessLauncher) -> None:
        with pytest.raises(BackendError, match="No such file"):
            await launcher.launch(ABSENT, "w-1")
        monkeypatch.setattr(processes, "open_watch", none_left)
        with pytest.raises(BackendError, match="Too many open files"):
            await launcher.launch(STUBBORN, "w-2")
        assert [is_running(pid) for pid in pids] == [False]
        assert await launcher.running() == {}

    with_launcher(tmp_path, check)
    assert list((tmp_path / "instances").iterdir()) == []


def test_instance_gets_only_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKED", "yes")

    async def main() -> None:
        def argv(_: Pool, __: str) -> list[str]:
            return [sys.executable, "-c", "import os; print(dict(os.environ))"]

        launcher = ProcessLauncher(tmp_path, argv, LoopClock(), {"A": "1", "B": "1"})
        await launcher.launch(Pool("p", env=(("B", "2"),)), "w-1")
        assert await end_of(launcher, "w-1") == "exit 0"
        await launcher.close(kill=True)

    asyncio.run(main())
    printed = (tmp_path / "logs" / "w-1.log").read_text()
    assert "'A': '1'" in printed
    assert "'B': '2'" in printed
    assert f"'{INSTANCE_VARIABLE}': 'w-1'" in printed
    assert "LEAKED" not in printed


def test_output_of_an_instance_is_in_its_log(tmp_path: Path) -> None:
    async def main() -> None:
        def argv(_: Pool, __: str) -> list[str]:
            return ["sh", "-c", "echo out; echo err >&2; exit 7"]

        launcher = ProcessLauncher(tmp_path, argv, LoopClock(), {})
        await launcher.launch(STEADY, "w-1")
        assert await end_of(launcher, "w-1") == "exit 7"
        await launcher.close(kill=True)

    asyncio.run(main())
    assert (tmp_path / "logs" / "w-1.log").read_text() == "out\nerr\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the open files of another process")
def test_an_instance_is_not_in_our_session_and_holds_none_of_our_files(tmp_path: Path) -> None:
    """A Ctrl-C in the manager's terminal must not reach the workers."""

    async def check(launcher: ProcessLauncher) -> None:
        await launcher.launch(STUBBORN, "w-1")
        await launcher.launch(STUBBORN, "w-2")
        await up(tmp_path, "w-2")
        pid = pid_of(tmp_path, "w-2")
        assert os.getsid(pid) == pid != os.getsid(0)
        log = str(tmp_path / "logs" / "w-2.log")
        # Look repeatedly, because the instance's own interpreter may open a file for a moment.
        await soon(lambda: targets(pid) == sorted(["/dev/null", log, log]))

    with_launcher(tmp_path, check)


def test_ended_instances_leave_no_file_descriptor_and_in_time_no_record(tmp_path: Path) -> None:
    clock = ManualClock()

    async def check(launcher: ProcessLauncher) -> None:
        await launcher.running()
        before = open_files()
        for n in range(10):
            await launcher.launch(STEADY, f"w-{n}")
            os.kill(pid_of(tmp_path, f"w-{n}"), signal.SIGKILL)
            assert await end_of(launcher, f"w-{n}") == "killed by SIGKILL, exit -9"
        assert open_files() == before
        clock.time_s += KEEP_ENDED_S
        assert len(await launcher.running()) == 10
        clock.time_s += 1.0
        assert await launcher.running() == {}
        assert list((tmp_path / "instances").iterdir()) == []

    with_launcher(tmp_path, check, clock=clock)


def test_folders_of_ended_instances_are_removed(tmp_path: Path) -> None:
    root, scratch = tmp_path / "fleet", tmp_path / "scratch"
    killed_manager(root, "steady-1,steady-2")
    for name in ("steady-1", "steady-2", "steady-3", "client-1"):
        (scratch / name / "code").mkdir(parents=True)
    pid = pid_of(root, "steady-1")
    os.kill(pid, signal.SIGKILL)

    def left() -> list[str]:
        return sorted(path.name for path in scratch.iterdir())

    async def main() -> None:
        launcher = process_launcher(root, scratch=scratch)
        try:
            await soon(lambda: not is_running(pid))
            assert await launcher.running() == {"steady-1": AWAY, "steady-2": None}
            await soon(lambda: left() == ["client-1", "steady-2", "steady-3"])
            await launcher.launch(STEADY, "steady-3")
            os.kill(pid_of(root, "steady-3"), signal.SIGKILL)
            await end_of(launcher, "steady-3")
            await soon(lambda: left() == ["client-1", "steady-2"])
        finally:
            await launcher.close(kill=True)
        assert left() == ["client-1"]

    asyncio.run(main())


# --- Ends -----------------------------------------------------------------------------------------


def test_a_death_is_noticed_without_looking(tmp_path: Path) -> None:
    """The launcher reports the death of an instance without polling."""

    async def check(launcher: ProcessLauncher) -> None:
        await launcher.launch(STEADY, "w-1")
        await up(tmp_path, "w-1")
        launcher.changed.clear()
        os.kill(pid_of(tmp_path, "w-1"), signal.SIGKILL)
        await asyncio.wait_for(launcher.changed.wait(), DEADLINE_S)
        assert (await launcher.running())["w-1"] == "killed by SIGKILL, exit -9"

    with_launcher(tmp_path, check)


def test_an_instance_takes_what_it_started_with_it(tmp_path: Path) -> None:
    """The children of a killed worker end with it."""

    async def main() -> None:
        def argv(_: Pool, __: str) -> list[str]:
            return ["sh", "-c", "sleep 100 & echo $!; echo up; wait"]

        launcher = ProcessLauncher(tmp_path, argv, LoopClock(), {"PATH": os.environ["PATH"]})
        await launcher.launch(STEADY, "w-1")
        await up(tmp_path, "w-1")
        child = int((tmp_path / "logs" / "w-1.log").read_text().split()[0])
        assert is_running(child)
        os.kill(pid_of(tmp_path, "w-1"), signal.SIGKILL)
        assert await end_of(launcher, "w-1") == "killed by SIGKILL, exit -9"
        await soon(lambda: not is_running(child))
        await launcher.close(kill=True)

    asyncio.run(main())


def test_close_ends_everything_or_nothing(tmp_path: Path) -> None:
    killed_manager(tmp_path, "stubborn-1")

    async def main() -> None:
        launcher = process_launcher(tmp_path)
        await launcher.launch(STUBBORN, "stubborn-2")
        await up(tmp_path, "stubborn-1", "stubborn-2")
        pids = [pid_of(tmp_path, "stubborn-1"), pid_of(tmp_path, "stubborn-2")]
        await launcher.close(kill=False)
        assert [is_running(pid) for pid in pids] == [True, True]
        after = process_launcher(tmp_path)
        assert await after.running() == {"stubborn-1": None, "stubborn-2": None}
        await after.close(kill=True)
        assert [is_running(pid) for pid in pids] == [False, False]

    asyncio.run(main())


# --- A manager that was killed --------------------------------------------------------------------


def test_instances_outlive_their_manager_and_are_adopted(tmp_path: Path) -> None:
    """The next manager adopts the instances of a killed manager."""
    killed_manager(tmp_path, "steady-1,stubborn-2,steady-3")

    async def check(launcher: ProcessLauncher) -> None:
        await up(tmp_path, "steady-1", "stubborn-2", "steady-3")
        assert list((await launcher.running()).values()) == [None] * 3
        await launcher.terminate("steady-1", grace_s=60.0)
        await launcher.terminate("stubborn-2", grace_s=0.1)
        os.kill(pid_of(tmp_path, "steady-3"), signal.SIGKILL)
        for name in ("steady-1", "stubborn-2", "steady-3"):
            # If this process is the new parent of the orphans, the kernel reports their exit codes to it.
            assert (await end_of(launcher, name)).startswith(("exited; its exit code is unknown", "exit "))
            assert not is_running(pid_of(tmp_path, name))

    with_launcher(tmp_path, check)


def test_end_during_the_managers_absence_is_reported_afterwards(tmp_path: Path) -> None:
    killed_manager(tmp_path, "steady-1,steady-2")
    pid = pid_of(tmp_path, "steady-1")
    os.kill(pid, signal.SIGKILL)

    async def check(launcher: ProcessLauncher) -> None:
        await soon(lambda: not is_running(pid))
        assert await launcher.running() == {"steady-1": AWAY, "steady-2": None}

    with_launcher(tmp_path, check)


def test_a_recycled_pid_is_never_signalled(tmp_path: Path) -> None:
    with stranger() as process:
        pid = process.pid
        write_record(tmp_path, "w-other-start", pid=pid, start_ticks=mark_of(pid) - 1)
        write_record(tmp_path, "w-other-boot", pid=pid, start_ticks=mark_of(pid), boot="x")

        async def check(launcher: ProcessLauncher) -> None:
            known = await launcher.running()
            assert known["w-other-start"] == AWAY
            assert known["w-other-boot"] == "ended with a restart of the machine"
            for name in known:
                await launcher.terminate(name, grace_s=0.0)

        with_launcher(tmp_path, check)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)


def test_processes_of_a_dead_instance_end_at_adoption(tmp_path: Path) -> None:
    async def main() -> None:
        def argv(_: Pool, __: str) -> list[str]:
            return ["sh", "-c", "sleep 100 & echo $! up; wait"]

        env = {"PATH": os.environ["PATH"]}
        before = ProcessLauncher(tmp_path, argv, LoopClock(), env)
        await before.launch(STEADY, "w-1")
        await up(tmp_path, "w-1")
        child = int((tmp_path / "logs" / "w-1.log").read_text().split()[0])
        await before.close(kill=False)
        os.kill(pid_of(tmp_path, "w-1"), signal.SIGKILL)
        os.waitpid(pid_of(tmp_path, "w-1"), 0)
        assert is_running(child)
        after = ProcessLauncher(tmp_path, argv, LoopClock(), env)
        assert await after.running() == {"w-1": AWAY}
        await soon(lambda: not is_running(child))

    asyncio.run(main())


@pytest.mark.parametrize("cut", [False, True], ids=["no pid yet", "cut short"])
def test_instance_with_an_unfinished_record_is_adopted(tmp_path: Path, cut: bool) -> None:
    """The manager died after the start of the instance and before it wrote the instance's pid."""
    write_record(tmp_path, "w-1")
    write_record(tmp_path, "w-2")
    if cut:
        (tmp_path / "instances" / "w-1.json").write_text('{"instance": "w-')
    env = {**os.environ, INSTANCE_VARIABLE: "w-1"}
    with stranger(env, leader=False), stranger(env) as process:

        async def check(launcher: ProcessLauncher) -> None:
            # A process that has just started may not show its environment yet.
            await soon(lambda: INSTANCE_VARIABLE in environment(process.pid))
            assert await launcher.running() == {"w-1": None, "w-2": AWAY}
            assert pid_of(tmp_path, "w-1") == process.pid
            await launcher.terminate("w-1", grace_s=60.0)
            assert await end_of(launcher, "w-1") == "killed by SIGTERM, exit -15"

        with_launcher(tmp_path, check)


def test_fleet_continues_after_its_manager_was_killed(tmp_path: Path) -> None:
    """The next manager continues the fleet of a killed manager."""
    killed_manager(tmp_path, "fleet")
    os.kill(pid_of(tmp_path, "w-0001"), signal.SIGKILL)

    async def check(launcher: ProcessLauncher) -> None:
        await soon(lambda: not is_running(pid_of(tmp_path, "w-0001")))
        ids = CountedIds()
        ids.count = 2
        fleet = ManagedFleet(launcher, LoopClock(), ids, StateFile(tmp_path / "fleet.json"))
        dead = list(await fleet.tick()) + list(await fleet.tick())
        assert names(dead) == ["w-0001"]
        (view,) = await fleet.describe()
        assert (view.pool, counted(view)) == (STEADY, ["w-0002", "w-0003"])

    with_launcher(tmp_path, check)
