"""The promises over many seeds with every kind of fault, and the report of a campaign.

BATCHLAB_SEEDS and BATCHLAB_FROM choose other seeds than the 120 seeds from 0. A run of the suite without `--all` tries
the first QUICK_SEEDS of them.
"""

from __future__ import annotations

import gc
import os
import shlex
import time
from collections.abc import Sequence
from unittest.mock import patch

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.model import JobId
from batchlab.sim import fuzz, invariants, trial
from batchlab.sim.actors import Violated
from batchlab.sim.faults import USER, Fault, FaultKind
from batchlab.sim.fuzz import Failure, SeedResult, Tally
from batchlab.sim.plans import draw
from batchlab.sim.process_pool import ProcessDeath
from batchlab.sim.world import World
from tests.sim.mutants.kit import check_worlds, unmutated

FIRST = int(os.environ.get("BATCHLAB_FROM", "0"))
SEEDS = int(os.environ.get("BATCHLAB_SEEDS", "120"))
QUICK_SEEDS = 20
AT_ONCE = 10
LIES = 10
ACCOUNTS = 10
MENDED = 10
AUDITED = 3
QUICK_S = 20.0
SMALL = (5, 3, 23, 28)
"""Seeds of worlds with few tasks."""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(seed, marks=[pytest.mark.slow] if seed >= FIRST + QUICK_SEEDS else [])
        for seed in range(FIRST, FIRST + SEEDS, AT_ONCE)
    ],
)
def test_no_promise_is_broken_in_any_weather(first: int) -> None:
    """Invariants I1 to I7 hold in random worlds. Faults may occur at any call."""
    for seed in range(first, min(first + AT_ONCE, FIRST + SEEDS)):
        with fuzz.silence():
            failure = unmutated(seed).failure
            if failure:
                found = fuzz.fewest(failure, "all", time.monotonic, limit_s=QUICK_S)
                command = fuzz.command(failure, "all", found.parts if found else None)
                pytest.fail(f"seed {seed}: {failure.text}\n{command}\n{failure.trace}")


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(AT_ONCE, LIES, AT_ONCE))]
)
def test_no_promise_is_broken_by_lying_workers(first: int) -> None:
    """Promise I8 holds, and I1 to I7 hold for each job without a message at a lying worker."""
    check_worlds(range(first, first + AT_ONCE), "lies")


@pytest.mark.parametrize("first", range(0, ACCOUNTS, AT_ONCE // 2))
def test_no_outcome_is_accounted_for_twice(first: int) -> None:
    """The accounts of jobs are compared with the events in their worlds."""
    check_worlds(range(first, first + AT_ONCE // 2), "accounts")


@pytest.mark.parametrize("first", range(0, MENDED, AT_ONCE // 2))
def test_each_task_runs_with_the_input_of_its_round(first: int) -> None:
    """Users retry failed tasks with mended inputs, and each start and each outcome has the input of its round."""
    check_worlds(range(first, first + AT_ONCE // 2), "mended")


def test_each_change_has_its_audit_record() -> None:
    """The audit log is compared with the requests of the users and with the writes to the bucket."""
    check_worlds(range(AUDITED), "audited")


def test_every_kind_of_fault_happens() -> None:
    """Seeds without faults prove nothing."""
    missing = {kind for kind in FaultKind if trial.ALL.rate(kind)}
    tasks = {n: sum(job.items or 0 for job in draw(n).jobs) for n in range(FIRST, FIRST + SEEDS)}
    left = {n: trial.weather_of(n) for n, number in tasks.items() if 3 < number < 60}

    def promise(seed: int) -> float:
        return sum(left[seed].rate(kind) / trial.ALL.rate(kind) for kind in missing)

    while missing and left:
        # In the order of their numbers, it takes a hundred worlds until the rarest fault has occurred.
        seed = max(left, key=promise)
        del left[seed]
        missing -= {fault.kind for fault in unmutated(seed).faults}
    assert not missing, f"in {SEEDS} seeds from {FIRST} never happened: {sorted(missing)}"


@pytest.mark.parametrize("seed", [0, 6, 11, 25, 33, 47])
def test_a_world_is_the_same_on_the_ledger_in_memory(seed: int) -> None:
    """The ledgers agree call by call in any world, and at the end the ledger in memory equals an SQL ledger that is
    rebuilt from the bucket (I3)."""
    logs: dict[bool, list[str]] = {True: [], False: []}
    with fuzz.silence():
        for sql, log in logs.items():
            trial.run(seed, log=log, sql=sql)
    for mine, its in zip(logs[True], logs[False], strict=True):
        # The ledger in memory does not round run times.
        said, _, answer = mine.partition(" -> ")
        if " ledger." in said and "#" in answer:
            assert its.startswith(said)
        elif " ledger.restore(" not in said:
            assert mine == its


# --- The report of a seed ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sums_do_not_depend_on_the_number_of_processes() -> None:
    sums = []
    for processes in (1, 2):
        tally = Tally()
        for tried in fuzz.campaign(SMALL, "storm", processes):
            tally.add(tried)
        sums.append(tally)
    one, two = sums
    assert one == two
    assert one.seeds == 4
    assert not one.failures
    assert min(one.tasks, one.starts, one.virtual_ms, one.times.total()) > 0
    assert one.managers >= one.seeds
    assert set(one.worlds) == set(one.times)
    assert max(one.worlds.values()) <= one.seeds


def test_the_weather_decides_what_happens() -> None:
    kinds = set()
    with fuzz.silence():
        for seed in SMALL:
            kinds |= {fault.kind for fault in fuzz.try_seed(seed, "crashes").faults}
    of_users = {kind for kind in FaultKind if kind.label == USER}
    assert kinds - of_users == {FaultKind.KILL_BEFORE, FaultKind.KILL_AFTER}


def test_all_that_happened_replays_it() -> None:
    with fuzz.silence():
        first = fuzz.try_seed(6, "all")
        again = fuzz.replay(6, "all", first.faults)
    assert first.faults
    assert again == first


def test_a_failed_seed_counts_by_its_faults_and_is_listed_by_number() -> None:
    lost, killed = Fault("a", 1, FaultKind.LOST), Fault("b", 2, FaultKind.KILL_AFTER)
    tally = Tally()
    for seed, faults in ((9, (lost, lost)), (3, (lost, killed))):
        tally.add(SeedResult(seed, faults, None, Failure(seed, "I1", "I1 is violated: x", faults)))
    assert [failure.seed for failure in tally.failures] == [3, 9]
    assert tally.seeds == 2
    assert tally.times == {FaultKind.LOST: 3, FaultKind.KILL_AFTER: 1}
    assert tally.worlds == {FaultKind.LOST: 2, FaultKind.KILL_AFTER: 1}


def test_seed_whose_process_dies_is_a_failure() -> None:
    with patch.object(fuzz, "spread", lambda work, seeds, processes: iter([(7, ProcessDeath(-9))])):
        (tried,) = fuzz.campaign([7], "all", 1)
    assert tried.failure is not None
    assert "exit code -9" in tried.failure.text


def test_no_world_is_left_in_memory() -> None:
    """A campaign of any length takes the same memory, even if seeds fail."""

    async def broken(world: World, jobs: Sequence[JobId]) -> None:
        raise Violated("I3 is violated: planted")

    with fuzz.silence():
        kept = [fuzz.try_seed(SMALL[0], "storm")]
        with patch.object(invariants, "check_all", broken):
            kept.append(fuzz.try_seed(SMALL[0], "storm"))
    assert kept[0].failure is None
    assert kept[1].failure is not None
    gc.collect()
    assert not [get_object for get_object in gc.get_objects() if isinstance(get_object, World)]


# --- Faults as text ------------------------------------------------------------------------------


def test_faults_can_be_written_and_read_and_a_shell_leaves_them_alone() -> None:
    with fuzz.silence():
        faults = list(fuzz.try_seed(6, "all").faults)
    text = fuzz.write(faults)
    assert fuzz.read(text) == faults
    assert shlex.quote(text) == text
    assert fuzz.read(fuzz.write([])) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is not a fault"),
        ("manager", "'manager' is not a fault"),
        ("manager:x:lost", "'manager:x:lost' is not a fault"),
        ("manager:1:lost,", "'' is not a fault"),
        ("manager:1:spilled", "fault 'spilled' does not exist"),
    ],
)
def test_unknown_fault_is_refused_with_a_remedy(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        fuzz.read(text)
    assert refused.value.remedy


def test_the_command_names_only_what_is_not_usual() -> None:
    faults = (Fault("a", 1, FaultKind.LOST), Fault("b", 2, FaultKind.KILL_AFTER))
    failure = Failure(12, "I1", "I1 is violated: x", faults)
    assert fuzz.command(failure, "all") == "batchlab sim replay 12"
    assert fuzz.command(failure, "all", faults) == "batchlab sim replay 12"
    assert fuzz.command(failure, "storm", faults[1:]) == (
        "batchlab sim replay 12 --only b:2:kill_after --weather storm"
    )
