"""The contract of every Ledger adapter for completions, each of which counts once in any order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchlab.adapters.memory.ledger import SimLedger
from batchlab.adapters.sql import open_memory
from batchlab.core.errors import NotFound
from batchlab.core.model import BundleId, Completion, JobId, StageCounts, TaskSet
from batchlab.core.ports import AddCut, BundleRecord, Cut, Fold, SetPlanned
from batchlab.sim.event_loop import SimLoop
from tests.support.contract.ledger_suite import (
    INDEX,
    JOB,
    RESIZE,
    TOTAL,
    DumpingLedger,
    bundle,
    counts_of,
    cut,
    done,
    fold,
    fold_in_batches,
    history,
    ledger_in,
    on_every_ledger,
    submit,
)


@on_every_ledger
async def test_counters_grow_with_the_outcomes(ledger: DumpingLedger) -> None:
    await submit(ledger)
    one = done(bundle(0, 10), failed=2, cancelled=1, run_s=3.25, started_s=100.0, retried=4)
    other = done(bundle(10, 12), run_s=0.5, started_s=90.0)
    assert await fold(ledger, one, other) == [True, True]
    assert await counts_of(ledger) == StageCounts(
        RESIZE, succeeded=9, failed=2, cancelled=1, retried=4, run_s=3.75, first_start_s=90.0, last_end_s=102.5
    )
    assert await counts_of(ledger, INDEX) == StageCounts(INDEX)


@on_every_ledger
async def test_first_start_and_last_end_are_stored_in_any_order(ledger: DumpingLedger) -> None:
    await submit(ledger)
    for i, started_s in enumerate((100.0, 300.0, 50.0, 200.0)):
        await fold(ledger, done(bundle(i, i + 1), started_s=started_s))
    counts = await counts_of(ledger)
    assert (counts.first_start_s, counts.last_end_s) == (50.0, 302.5)


@on_every_ledger
async def test_repeated_outcome_counts_once(ledger: DumpingLedger) -> None:
    """Events are delivered at least once, so duplicates must be harmless."""
    await submit(ledger)
    one, other = done(bundle(0, 5)), done(bundle(5, 7))
    assert await fold(ledger, one, one, other, one) == [True, False, True, False]
    before = await ledger.dump()
    assert await fold(ledger, other) == [False]
    assert await fold(ledger, one, done(bundle(7, 8)), other) == [False, True, False]
    assert (await counts_of(ledger)).succeeded == 8
    assert await ledger.dump() != before


@on_every_ledger
async def test_second_outcome_of_a_bundle_changes_nothing(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await fold(ledger, done(bundle(0, 5)))
    before = await ledger.dump()
    assert await fold(ledger, done(bundle(0, 5), bundle(0, 5, attempt=2), failed=5)) == [False]
    assert await ledger.dump() == before


@on_every_ledger
async def test_follows_become_planned(ledger: DumpingLedger) -> None:
    await submit(ledger)
    retry, chained = bundle(0, 2, attempt=2), bundle(2, 5, stage=INDEX)
    await fold(ledger, done(bundle(0, 5), retry, chained))
    planned = [r.bundle for r in await ledger.bundles(JOB.id, done=False)]
    assert planned == [chained, retry]
    assert (await counts_of(ledger, INDEX)).terminal == 0


@on_every_ledger
async def test_follow_up_folded_before_its_parent_stays_done(ledger: DumpingLedger) -> None:
    await submit(ledger)
    follow = bundle(0, 5, stage=INDEX)
    assert await fold(ledger, done(follow)) == [True]
    assert await fold(ledger, done(bundle(0, 5), follow)) == [True]
    assert await fold(ledger, done(follow)) == [False]
    assert list(await ledger.bundles(JOB.id, done=False)) == []
    assert (await counts_of(ledger, INDEX)).succeeded == 5


@on_every_ledger
async def test_parent_and_follow_up_may_be_folded_together_in_any_order(ledger: DumpingLedger) -> None:
    await submit(ledger)
    for start, parent_first in ((0, True), (5, False)):
        follow = bundle(start, start + 5, stage=INDEX)
        both = [done(bundle(start, start + 5), follow), done(follow)]
        assert await fold(ledger, *(both if parent_first else both[::-1])) == [True, True]
    assert list(await ledger.bundles(JOB.id, done=False)) == []
    assert (await counts_of(ledger, INDEX)).succeeded == 10


@on_every_ledger
async def test_an_outcome_of_a_bundle_that_was_never_planned_is_folded(ledger: DumpingLedger) -> None:
    await submit(ledger)
    unplanned = done(bundle(3, 4, attempt=2))
    assert await fold(ledger, unplanned) == [True]
    (record,) = await ledger.bundles(JOB.id)
    assert record.completion == unplanned


@on_every_ledger
async def test_casualties_count_as_cancelled_once(ledger: DumpingLedger) -> None:
    await submit(ledger)
    one, other = done(bundle(0, 5), failed=2), done(bundle(5, 9), failed=1)
    lost, more = {INDEX: 2, TOTAL: 2}, {INDEX: 1}
    await ledger.apply(Fold([one, one, other], [lost, lost, more]))
    await ledger.apply(Fold([other, one], [more, lost]))
    assert await counts_of(ledger, INDEX) == StageCounts(INDEX, cancelled=3)
    assert await counts_of(ledger, TOTAL) == StageCounts(TOTAL, cancelled=2)
    assert (await counts_of(ledger)).cancelled == 0


@on_every_ledger
async def test_answer_lists_the_assigned_sequence_numbers(ledger: DumpingLedger) -> None:
    """A client that waits for outcomes continues after the last seq that it received."""
    await submit(ledger)
    for start in (0, 3):
        some = [done(bundle(n, n + 1), failed=1) for n in range(start, start + 3)]
        folded = await ledger.apply(Fold(some, [{INDEX: 1, TOTAL: 1}, {}, {INDEX: 7}]))
        records = (await ledger.bundles(JOB.id))[start:]
        assert [r.seq for r in records] == [folded.first_seq + n for n in range(3)]


@on_every_ledger
async def test_run_time_adds_up_to_the_microsecond(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await fold(ledger, *(done(bundle(i, i + 1), run_s=0.1) for i in range(1_000)))
    await fold(ledger, done(bundle(1_000, 1_001), run_s=1e9 + 1e-6))
    assert (await counts_of(ledger)).run_s == 1_000_000_100.000001
    await fold(ledger, done(bundle(1_001, 1_002), run_s=0.000249))
    assert (await counts_of(ledger)).run_s == 1_000_000_100.000250, "rounded, not cut off"


@on_every_ledger
async def test_a_call_that_cannot_be_folded_leaves_nothing(ledger: DumpingLedger) -> None:
    await submit(ledger)
    before = await ledger.dump()
    stranger = done(replace(bundle(0, 1), job=JobId("nobody")))
    with pytest.raises(NotFound):
        await fold(ledger, done(bundle(0, 5), bundle(0, 5, stage=INDEX)), stranger)
    assert await ledger.dump() == before
    assert await fold(ledger, done(bundle(0, 5))) == [True]


@on_every_ledger
async def test_nothing_is_folded_by_an_empty_call(ledger: DumpingLedger) -> None:
    await submit(ledger)
    before = await ledger.dump()
    assert await fold(ledger) == []
    assert await ledger.dump() == before


@on_every_ledger
async def test_one_call_may_fold_several_jobs(ledger: DumpingLedger) -> None:
    twin = replace(JOB, id=JobId("photos-2"))
    await submit(ledger)
    await submit(ledger, twin)
    mine, its = bundle(0, 5), replace(bundle(0, 5), job=twin.id)
    assert await fold(ledger, done(its, failed=5), done(mine)) == [True, True]
    assert [(await ledger.rows(j)).stages[0].counts.failed for j in (JOB.id, twin.id)] == [0, 5]
    assert [r.bundle for r in await ledger.bundles(twin.id)] == [its]


# --- Reading bundles -----------------------------------------------------------------------------


@on_every_ledger
async def test_bundle_is_returned_as_written(ledger: DumpingLedger) -> None:
    await submit(ledger)
    scattered = TaskSet(((0, 1), (7, 9), (10**8, 10**8 + 3)))
    planned = replace(bundle(0, 1), tasks=scattered, attempt=3, round=2, losses=1, source=BundleId("x"))
    completion = done(replace(planned, stage=INDEX, losses=2), planned, failed=1, cancelled=2, run_s=0.123456)
    await fold(ledger, completion)
    done_record, planned_record = await ledger.bundles(JOB.id)
    assert planned_record == BundleRecord(planned)
    assert (done_record.bundle, done_record.completion) == (completion.bundle, completion)


@on_every_ledger
async def test_folded_bundles_are_listed_in_order_before_planned_ones(ledger: DumpingLedger) -> None:
    await submit(ledger)
    b, a, c = bundle(1, 2), bundle(0, 1), bundle(2, 3)
    later = bundle(0, 9, stage=INDEX)
    await ledger.apply(AddCut(cut(0, c, a, b, bundle(9, 10), bundle(8, 9))))
    await fold(ledger, done(b), done(a, later))
    await fold(ledger, done(c), done(b))
    records = await ledger.bundles(JOB.id)
    assert [r.bundle for r in records] == [b, a, c, later, bundle(8, 9), bundle(9, 10)]
    seqs = [r.seq for r in records if r.seq is not None]
    assert seqs == sorted(set(seqs))
    assert len(seqs) == 3


@on_every_ledger
async def test_bundles_are_filtered(ledger: DumpingLedger) -> None:
    await submit(ledger)
    good, bad, chained = (
        done(bundle(0, 5), bundle(0, 5, stage=INDEX)),
        done(bundle(5, 9), failed=1),
        done(bundle(5, 8, stage=INDEX)),
    )
    await ledger.apply(AddCut(cut(0, bundle(20, 30))))
    await fold(ledger, good, chained, bad)

    async def check(found: Awaitable[Sequence[BundleRecord]], *expected: str) -> None:
        assert [f"{r.bundle.stage}:{r.bundle.tasks.first}" for r in await found] == [*expected]

    of = partial(ledger.bundles, JOB.id)
    await check(of(done=True), "resize:0", "index:5", "resize:5")
    await check(of(done=False), "index:0", "resize:20")
    await check(of(stage=INDEX), "index:5", "index:0")
    await check(of(failed=True), "resize:5")
    await check(of(failed=True, stage=INDEX))
    await check(of(done=True, limit=1), "resize:0")
    await check(of(done=False, stage=RESIZE, limit=5), "resize:20")


@on_every_ledger
async def test_pages_of_bundles_visit_each_completion_once(ledger: DumpingLedger) -> None:
    await submit(ledger)
    seen: list[int] = []
    last = -1
    await ledger.apply(AddCut(cut(0, bundle(100, 101))))
    for i in range(0, 30, 3):
        await fold(ledger, *(done(bundle(n, n + 1)) for n in range(i + 2, i - 1, -1)))
        page = await ledger.bundles(JOB.id, after_seq=last, limit=2)
        seen += [r.bundle.tasks.first for r in page]
        last = page[-1].seq or 0
    while page := await ledger.bundles(JOB.id, after_seq=last, limit=4):
        assert len(seen) < 30
        seen += [r.bundle.tasks.first for r in page]
        last = page[-1].seq or 0
    assert sorted(seen) == list(range(30))


# --- Any order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [open_memory, SimLedger])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.integers(1, 25))
def test_the_order_of_events_leaves_no_trace(make: Callable[[], DumpingLedger], rng: Random, tasks: int) -> None:
    """Events may arrive twice, late, and in any order, but the sums are the same.

    The reference folds one completion at a time, parents first. Invariant I2 holds for both ledgers.
    """
    cuts, completions = history(rng, tasks)
    events: list[Completion | Cut] = [*completions, *rng.choices(completions, k=len(completions))]
    rng.shuffle(events)
    # The cuts keep their order, but arrive at any point among the completions.
    places = sorted(rng.choices(range(len(events)), k=len(cuts)))
    for place, one in zip(reversed(places), reversed(cuts), strict=True):
        events.insert(place, one)

    async def main() -> None:
        rough = make()
        async with ledger_in(None) as plain:
            for ledger in (plain, rough):
                await submit(ledger)
                await ledger.apply(SetPlanned(JOB.id, INDEX, tasks, 0))
            for cut in cuts:
                await plain.apply(AddCut(cut))
            await fold_in_batches(plain, completions, lambda: 1)
            batch: list[Completion] = []
            for event in events:
                if isinstance(event, Cut):
                    await rough.apply(AddCut(event))
                else:
                    batch.append(event)
                if rng.random() < 0.3:
                    await fold_in_batches(rough, batch, lambda: rng.randint(1, 9))
                    batch.clear()
            await fold_in_batches(rough, batch, lambda: rng.randint(1, 9))
            assert await rough.dump() == await plain.dump()
            for stage in (RESIZE, INDEX):
                counts = await counts_of(rough, stage)
                assert counts.terminal == counts.planned == tasks
        await rough.close()

    SimLoop().run(main())
