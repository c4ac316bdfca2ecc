"""The faults on grids whose instances are processes, each with a job whose results are correct."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import pytest

from batchlab.adapters.local.processes import living
from batchlab.core.model import Pool
from batchlab.core.operating_system.processes import is_stopped, parent_of
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.scenarios.faults import processes
from batchlab.scenarios.faults.fault_injection import TABLE, FaultInjector
from batchlab.scenarios.faults.proxy import with_proxy
from batchlab.scenarios.model.values import Fault, FaultName
from batchlab.scenarios.record import InjectedFault
from tests.support.aws.emulators import ministack_python
from tests.support.grid.local_grid import LocalGrid, processes_of
from tests.support.scenarios.fault_injection import Bench, Work, number
from tests.support.waiting import until
from tests.support.worker.runner import until as until_async

POOLS = (Pool("default", 2, 2, 1),)


@pytest.fixture(scope="module", params=["local", "ministack"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    name, folder = request.param, tmp_path_factory.mktemp("harm")
    if name == "ministack":
        ministack_python()
    with ExitStack() as stack:
        home = Home(folder / "home")
        backend, front = stack.enter_context(with_proxy(factory.load(name), home, print))
        grid = LocalGrid(home.path, POOLS, backend=name, endpoint=backend.endpoint)
        stack.callback(grid.stop)
        yield Bench(grid, folder, front)
    until(lambda: not processes_of(home.path), 10)


def stand_still(pids: Iterable[int]) -> bool:
    return all(map(is_stopped, pids))


def test_killed_instances_are_replaced(bench: Bench) -> None:
    with bench.work(20, 0.2) as work:
        before = living(bench.grid.home.fleet)
        seen = work.hurt(FaultName.KILL, count=1)
        (target,) = seen.targets
        assert parent_of(before[target]) is None
        assert seen.evidence == f"{target} (pid {before[target]}): killed by SIGKILL, exit -9"
        until(lambda: len(bench.in_service()) == 2 and target not in bench.in_service(), 30)


def test_paused_instances_freeze_and_resume(bench: Bench) -> None:
    with bench.work(20, 0.2) as work:
        pids = living(bench.grid.home.fleet)

        async def pause(injector: FaultInjector) -> InjectedFault:
            doing = asyncio.ensure_future(injector.inject(Fault(FaultName.PAUSE, 0, for_s=2.0, share=1.0), 0))
            await until_async(lambda: stand_still(pids.values()), "the pause")
            return await doing

        seen = work.injecting(pause)
        assert set(seen.targets) == set(pids)
        assert not any(map(is_stopped, pids.values()))
        halted, still = number(r"^(\d+) of", seen), number(r", (\d+) of them for", seen)
        assert halted == still > len(pids), "the workers, and what they have started"


def test_canceled_replay_resumes_paused_processes(bench: Bench) -> None:
    with bench.work(10, 0.2) as work:
        pids = living(bench.grid.home.fleet)

        async def cancel(injector: FaultInjector) -> None:
            doing = asyncio.ensure_future(injector.inject(Fault(FaultName.PAUSE, 0, for_s=600.0), 0))
            await until_async(lambda: stand_still(pids.values()), "the pause")
            doing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doing

        work.injecting(cancel)
        assert not any(map(is_stopped, pids.values()))


def test_undo_reports_the_effects_so_far(bench: Bench) -> None:
    with bench.work(10, 0.2) as work:
        pids = living(bench.grid.home.fleet)

        async def undo(injector: FaultInjector) -> InjectedFault:
            doing = asyncio.ensure_future(injector.inject(Fault(FaultName.PAUSE, 0, for_s=600.0, count=1), 0))
            await until_async(lambda: any(stand_still([pid]) for pid in pids.values()), "the pause")
            await injector.undo()
            return await doing

        seen = work.injecting(undo)
        assert number(r"of them for ([\d.]+) s", seen) < 10
        assert len(seen.targets) == 1


def test_spot_wave_lets_instances_exit_and_kills_the_rest(bench: Bench) -> None:
    with bench.work(20, 0.2) as work:
        seen = work.hurt(FaultName.SPOT_WAVE, count=1, notice_s=15.0)
        (target,) = seen.targets
        assert seen.evidence.startswith("1 of 1 instances ended by themselves")
        assert f"{target}: exit 0" in seen.evidence
    with bench.work(5, 3.0) as work:
        seen = work.hurt(FaultName.SPOT_WAVE, notice_s=0.3)
        killed = number(r"(\d+) were killed", seen)
        assert killed == seen.evidence.count("exit -9") >= 1, "who has work does not leave in 0.3 s"


def test_partition_needs_a_network(bench: Bench) -> None:
    with bench.work(20, 0.2) as work:
        seen = work.hurt(FaultName.PARTITION, count=1, for_s=4.0)
        if bench.front is None:
            assert seen.impossible + "." == TABLE[FaultName.PARTITION]["local"].why_not
            return
        assert number(r"^(\d+) requests", seen) > 0
        assert bench.front.counts.kept_waiting > 0


def test_s3_answers_503_on_backends_with_s3(bench: Bench) -> None:
    with bench.work(60, 0.1) as work:
        seen = work.hurt(FaultName.S3_ERRORS, rate=0.4, for_s=5.0)
        if bench.front is None:
            assert seen.impossible + "." == TABLE[FaultName.S3_ERRORS]["local"].why_not
            return
        refused, asked = number(r"^(\d+) of", seen), number(r"of (\d+) requests", seen)
        assert 0 < refused < asked
        assert refused == bench.front.counts.refused


def test_messages_are_duplicated(bench: Bench) -> None:
    with bench.work(80, 0.2) as work:
        seen = work.hurt(FaultName.SQS_DUPLICATES, rate=1.0, for_s=4.0)
        assert seen.targets == ("tasks-default", "events")
        doubled = number(r"^(\d+) of", seen)
        assert doubled > 0
        assert number(r"and (\d+) of the originals", seen) == doubled


def test_messages_are_delayed(bench: Bench) -> None:
    with bench.work(80, 0.2) as work:
        seen = work.hurt(FaultName.SQS_DELAYS, rate=0.5, for_s=4.0)
        late = number(r"^(\d+) of", seen)
        assert 0 < late <= number(r"of (\d+) received messages", seen)
        assert number(r"were hidden, and (\d+) of them", seen) == late
        assert number(r"to ([\d.]+) s each", seen) > 1.0


def test_a_disk_is_slow(bench: Bench) -> None:
    if bench.front is not None:
        return  # the fault depends only on the folder, and its programs use all cores
    with bench.work(20, 0.1) as work:
        seen = work.hurt(FaultName.SLOW_DISK, for_s=1.0)
        if seen.trouble:  # the disk was busy with other work before
            assert "was not 2 times as slow: an fsync of 4 KiB took" in seen.trouble
        else:
            before = number(r"took ([\d.]+) ms before", seen)
            assert number(r"and ([\d.]+) ms during", seen) >= 1.9 * before
        assert not any(processes.WRITER_PROGRAM in words for words in processes_of(bench.grid.home.scratch).values())


def test_crashed_manager_is_succeeded(bench: Bench) -> None:
    with bench.work(30, 0.2) as work:
        before = bench.grid.home.record()
        assert before is not None
        seen = work.hurt(FaultName.MANAGER_CRASH, for_s=2.0)
        after = bench.grid.home.record()
        assert after is not None
        assert seen.targets == (before.owner,)
        assert after.pid != before.pid
        assert after.url == before.url, "whoever knows its address goes on"
        assert f"{after.owner} (pid {after.pid}) led" in seen.evidence
        assert number(r"([\d.]+) s later", seen) > 2.0


def test_a_lost_ledger_is_rebuilt(bench: Bench) -> None:
    with bench.work(30, 0.2) as work:
        jobs = len(bench.grid.client.jobs())
        seen = work.hurt(FaultName.DATABASE_LOSS, for_s=1.0)
        assert f"it had {jobs} jobs, " in seen.evidence
        assert number(r"jobs, (\d+) after the loss", seen) < jobs
        assert f"and {jobs} after the rebuild" in seen.evidence
        assert len(bench.grid.client.jobs()) == jobs


def test_local_grid_has_no_zone_to_lose(bench: Bench) -> None:
    seen = Work(bench.grid, bench.front, "").hurt(FaultName.ZONE_LOSS)
    assert seen.impossible + "." == TABLE[FaultName.ZONE_LOSS][bench.grid.backend.name].why_not
    assert not seen.targets
