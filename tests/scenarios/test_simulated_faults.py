"""The faults of a scenario's timeline in the simulated grid. Each fault is injected and visible there, and costs time
and money but no task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

from batchlab.core.model import JobId, JobState, Market, Pool
from batchlab.runtime import factory
from batchlab.scenarios.forecast.simulate import ForecastOptions, simulate
from batchlab.scenarios.model.distributions import Constant
from batchlab.scenarios.model.values import Fault, FaultName, PoolPlan, StageTemplate, WorkKind
from batchlab.scenarios.record import Record
from batchlab.sim import invariants
from batchlab.sim.world import World
from tests.support.scenarios.small_scenarios import claims

POOL = PoolPlan(Pool("default", 4, 6, 2, 30.0, instance_type="m7i.large"), 0.5)
AT_S, FOR_S = 20.0, 40.0
STAGES = (
    StageTemplate("read", Constant(6.0), kind=WorkKind.IO),
    StageTemplate("write", Constant(1.0), after=("read",)),
)


async def promises(world: World, jobs: Sequence[JobId]) -> None:
    """Check invariants I1, I2, I3, and I7."""
    await invariants.check_all(world, jobs)


def struck(*faults: Fault, like: str = "aws", pool: PoolPlan = POOL) -> Record:
    """Return the record of three jobs on four instances with these faults in the middle."""
    plan = claims(*STAGES, jobs=3, gap_s=9.0, tasks=30, pool=pool, faults=faults)
    options = ForecastOptions(watched=True, examine=promises)
    record = simulate(plan, like=factory.load(like), options=options)
    assert (record.lost, record.duplicates, record.cut) == (0, 0, "")
    assert [job.state for job in record.jobs] == [JobState.SUCCEEDED] * 3
    return record


def counted(record: Record) -> list[int]:
    """Return the whole numbers in the evidence of the record's only fault."""
    (one,) = record.faults
    assert not one.impossible
    assert one.at_s == pytest.approx(AT_S, abs=0.1)
    return [int(text) for text in re.findall(r"(?<![\w.-])\d+(?![\w.-])", one.evidence)]


COUNTS = {
    # The table has the position of a number in the evidence, and the number's minimum.
    FaultName.KILL: ((0, 2), (1, 1)),
    FaultName.PAUSE: ((0, 2), (3, 1)),
    FaultName.PARTITION: ((0, 5), (1, 2)),
    FaultName.SPOT_WAVE: ((0, 1),),
    FaultName.ZONE_LOSS: ((0, 2), (2, 1)),
    FaultName.S3_ERRORS: ((0, 5),),
    FaultName.SQS_DUPLICATES: ((0, 3),),
    FaultName.SQS_DELAYS: ((0, 3),),
    FaultName.SLOW_DISK: ((0, 5), (1, 5)),
    FaultName.MANAGER_CRASH: ((0, 3),),
    FaultName.DATABASE_LOSS: ((0, 3), (1, 0)),
}


@pytest.mark.parametrize("name", list(FaultName))
def test_a_fault_is_injected_and_seen_and_loses_no_task(name: FaultName) -> None:
    fault = Fault(name, AT_S, FOR_S, share=0.5, notice_s=20.0, rate=0.3)
    record = struck(fault)
    numbers = counted(record)
    for place, least in COUNTS[name]:
        assert numbers[place] >= least, record.faults
    told = record.faults[0]
    ended = {instance.id: instance for instance in record.instances if instance.id in told.targets}
    if name in (FaultName.KILL, FaultName.ZONE_LOSS):
        assert {one.ended_s for one in ended.values()} == {told.at_s}
    if name is FaultName.SPOT_WAVE:
        assert {one.market for one in ended.values()} == {Market.SPOT.value}
        assert all(one.ended_s and one.ended_s <= told.at_s + 25 for one in ended.values())
        assert "ended within 20 s of the interruption notice" in told.evidence
    if name is FaultName.ZONE_LOSS:
        (zone,) = {one.zone for one in ended.values()}
        later = [instance for instance in record.instances if AT_S < instance.launched_s < AT_S + FOR_S]
        assert later, "what died is replaced"
        assert zone not in {one.zone for one in later}
    if name is FaultName.DATABASE_LOSS:
        assert numbers[-1] == 3, "all jobs are in the ledger again"


def test_fault_without_a_target_is_reported() -> None:
    nobody = replace(POOL, pool=replace(POOL.pool, min_size=0))
    fault = Fault(FaultName.KILL, 5.0)
    record = simulate(claims(*STAGES, jobs=1, tasks=2, pool=nobody, faults=(fault,)))
    (one,) = record.faults
    assert one.impossible == "no instance was in service then"
    assert not one.evidence


def test_a_pool_in_one_zone_cannot_launch_while_that_is_lost() -> None:
    pool = PoolPlan(Pool("default", 2, 2, 2, 30.0))
    fault = Fault(FaultName.ZONE_LOSS, 20.0, 60.0)
    record = simulate(claims(*STAGES, jobs=1, tasks=60, pool=pool, zones=1, faults=(fault,)))
    assert record.lost == 0
    assert not [instance for instance in record.instances if 20 <= instance.launched_s < 80]
    assert "0 launches were refused" not in record.faults[0].evidence


def test_impossible_fault_can_be_skipped() -> None:
    why = "there is no network to be cut"
    plan = claims(*STAGES, jobs=1, pool=POOL, faults=(Fault(FaultName.PARTITION, AT_S, FOR_S),))
    record = simulate(plan, options=ForecastOptions(impossible={FaultName.PARTITION: why}))
    (one,) = record.faults
    assert (one.impossible, one.evidence, one.targets) == (why, "", ())


def led_after_s(record: Record) -> float:
    """Return the time from the manager's death until another one led, from the fault's evidence."""
    (one,) = record.faults
    (found,) = re.findall(r"led ([\d.]+) s later", one.evidence)
    return float(found)


@pytest.mark.parametrize(
    ("like", "least_s", "most_s"),
    [
        # The manager restarts after the fault, in the folder that contains its lease.
        ("local", FOR_S, FOR_S + 3.0),
        ("ministack", FOR_S, FOR_S + 3.0),
        # Docker restarts the manager at once, in the same folder.
        ("localstack", 0.5, 10.0),
        # Auto Scaling starts the manager on another instance, which must wait until the lease expires.
        ("aws", 120.0, 260.0),
    ],
)
def test_a_dead_manager_is_followed_as_its_backend_does_it(like: str, least_s: float, most_s: float) -> None:
    record = struck(Fault(FaultName.MANAGER_CRASH, AT_S, FOR_S), like=like)
    assert least_s <= led_after_s(record) <= most_s


@pytest.mark.parametrize(("like", "taken"), [("local", 3), ("aws", 2)])
def test_spot_wave_hits_the_instances_of_its_backend(like: str, taken: int) -> None:
    # Two of the four instances are Spot. Processes do not have a market, so the wave takes any of them.
    four = replace(POOL, pool=replace(POOL.pool, max_size=4))
    wave = Fault(FaultName.SPOT_WAVE, AT_S, share=0.75, notice_s=20.0)
    (one,) = struck(wave, like=like, pool=four).faults
    assert len(one.targets) == taken


def test_existing_container_instances_are_not_spot() -> None:
    # In a replay, the groups buy the Spot share of all later launches.
    record = struck(like="localstack", pool=replace(POOL, spot=1.0))
    markets = [instance.market for instance in record.instances]
    assert markets[:4] == [Market.ON_DEMAND] * 4
    assert set(markets[4:]) == {Market.SPOT}


def test_the_oldest_instances_are_hit_as_in_a_replay() -> None:
    record = struck(Fault(FaultName.KILL, AT_S, count=2))
    assert list(record.faults[0].targets) == [instance.id for instance in record.instances[:2]]


def test_additional_fault_does_not_change_other_faults() -> None:
    # The added faults have rates that hit nothing, and must not change the random numbers of other faults.
    before = [Fault(FaultName.SQS_DELAYS, AT_S - 1, 20.0, rate=1e-9)]
    before += [Fault(FaultName.SQS_DUPLICATES, AT_S - 1, 0.5, rate=1e-9)]
    twice = Fault(FaultName.SQS_DUPLICATES, AT_S, 10.0, rate=0.3)
    kill = Fault(FaultName.KILL, AT_S + 5, count=2)
    assert struck(*before, twice, kill).faults[2:] == struck(twice, kill).faults


@pytest.mark.parametrize("name", list(FaultName))
def test_fault_without_an_effect_is_not_evidence(name: FaultName) -> None:
    # The pool is empty, no task runs, and no job is due for an hour.
    nobody = replace(POOL, pool=replace(POOL.pool, min_size=0))
    fault = Fault(name, 5.0, 10.0, rate=1.0, notice_s=5.0)
    plan = claims(*STAGES, jobs=1, tasks=2, pool=nobody, first_s=3600.0, faults=(fault,))
    (one,) = simulate(plan).faults
    if name is FaultName.MANAGER_CRASH:  # the manager always runs
        assert one.evidence
    else:
        assert one.impossible
        assert (one.evidence, one.targets) == ("", ())


def test_partition_without_calls_is_not_evidence() -> None:
    record = struck(Fault(FaultName.PARTITION, AT_S, 0.001, count=1))
    assert record.faults[0].impossible == "the instances made no call during the fault"


def test_slow_disk_affects_the_selected_instances() -> None:
    def slowed(like: str, *, share: float = 1.0, count: int | None = None) -> list[int]:
        """Return the number of instances with a slow disk, and the number of bundles that began late there."""
        fault = Fault(FaultName.SLOW_DISK, AT_S, FOR_S, share=share, count=count)
        record = struck(fault, like=like)
        return [len(record.faults[0].targets), counted(record)[0]]

    one, half, every = slowed("aws", count=1), slowed("aws", share=0.5), slowed("aws")
    assert (one[0], half[0], every[0]) == (1, 2, 4)
    assert 0 < one[1] <= half[1] < every[1]
    assert slowed("local", count=1)[0] >= 4, "processes of one machine have one disk"


def test_adjacent_pauses_are_continuous() -> None:
    first, second = (Fault(FaultName.PAUSE, at_s, 15.0, count=1) for at_s in (AT_S, AT_S + 15.0))
    steps = [int(re.findall(r"(\d+) of their steps", fault.evidence)[0]) for fault in struck(first, second).faults]
    assert steps[1] >= steps[0] > 0, "who had been let go between the two would have fewer"


def test_speculative_copies_shorten_a_run_with_a_frozen_instance() -> None:
    """The instance freezes while the last tasks run. Without copies, their messages return after half a minute."""
    pool = PoolPlan(Pool("default", 4, 4, 4, 30.0, instance_type="c7i.xlarge"))
    ends_s = []
    for copies in (False, True):
        stage = StageTemplate("work", Constant(10.0), bundle=1, speculative_copies=copies)
        plan = claims(
            stage, jobs=1, gap_s=1.0, tasks=80, pool=pool, faults=(Fault(FaultName.PAUSE, 45.0, 600.0, count=1),)
        )
        record = simulate(plan, like=factory.load("aws"), options=ForecastOptions(watched=True, examine=promises))
        assert (record.lost, record.duplicates, record.cut) == (0, 0, "")
        assert "1 instance with 4 running bundles" in record.faults[0].evidence
        ends_s.append(max(job.ended_s or 0.0 for job in record.jobs))
    assert ends_s[1] < ends_s[0] - 4.0
