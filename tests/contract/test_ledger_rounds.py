"""The contract of every Ledger adapter for a job's end, and for the rounds after it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import NotFound
from batchlab.core.model import Control, JobId, JobState, StageName, TaskSet
from batchlab.core.ports import (
    AddCut,
    AddJob,
    BundleResult,
    Ending,
    Finish,
    Fold,
    JobHistory,
    JobRecord,
    MoveJob,
    Reopen,
    Reopening,
    Round,
    SetControl,
    SetPlanned,
)
from tests.support.contract.ledger_suite import (
    CALLS,
    INDEX,
    JOB,
    RESIZE,
    DumpingLedger,
    bundle,
    counts_of,
    cut,
    done,
    fold,
    ledger_in,
    on_every_ledger,
    rows_of,
    set_control,
    stage_of,
    submit,
)


async def _finish(ledger: DumpingLedger, state: JobState = JobState.FAILED, *, round: int = 0, **closed: int) -> bool:
    written = await ledger.apply(
        Finish(
            JOB.id,
            Ending(state, f"end of {round}", 50.0 + round, {StageName(name): count for name, count in closed.items()}),
            round,
        )
    )
    assert written.rows == await ledger.rows(JOB.id)
    return written.is_new


@on_every_ledger
async def test_the_end_counts_what_never_came_to_be_as_cancelled(ledger: DumpingLedger) -> None:
    """The sums are consistent whenever a job is stopped, so the job never hangs (I2)."""
    await submit(ledger)
    await ledger.apply(AddCut(replace(cut(0, bundle(0, 4)), planned=10)))
    await fold(ledger, done(bundle(0, 4), failed=1))
    assert await _finish(ledger, resize=6, index=3)
    record = await ledger.job(JOB.id)
    assert (record.state, record.reason, record.ended_s) == (JobState.FAILED, "end of 0", 50.0)
    assert [(s.counts.planned, s.counts.terminal) for s in (await ledger.rows(JOB.id)).stages] == [
        (10, 10),
        (3, 3),
        (0, 0),
    ]
    assert (await counts_of(ledger)).cancelled == 6


@on_every_ledger
async def test_a_job_ends_once_a_round(ledger: DumpingLedger) -> None:
    await submit(ledger)
    assert not await _finish(ledger, round=1), "another round's end"
    assert await _finish(ledger, resize=4)
    before = await ledger.dump()
    assert not await _finish(ledger, resize=4)
    assert not await _finish(ledger, JobState.SUCCEEDED)
    assert await ledger.dump() == before


@pytest.mark.parametrize("state", [s for s in JobState if not s.ended])
def test_every_job_that_has_not_ended_can_end(state: JobState, tmp_path: Path) -> None:
    """The bucket contains the end of the job, whatever the ledger contains (I7)."""

    async def main() -> None:
        async with ledger_in(tmp_path / "ledger.sqlite") as ledger:
            await ledger.apply(AddJob(JOB, state))
            assert await _finish(ledger)
            assert (await ledger.job(JOB.id)).state is JobState.FAILED

    asyncio.run(main())


@on_every_ledger
async def test_a_reason_may_hold_any_text(ledger: DumpingLedger) -> None:
    await submit(ledger)
    reason = 'it\'s "0" \\ 漢字 \N{PILE OF POO}\n%s :x '
    await ledger.apply(Finish(JOB.id, Ending(JobState.FAILED, reason + "\0", 1.0, {}), 0))
    assert (await ledger.job(JOB.id)).reason.startswith(reason)


@on_every_ledger
async def test_ended_job_ignores_changes(ledger: DumpingLedger) -> None:
    """A pause that arrives after the end is ignored, or the result would depend on timing."""
    await submit(ledger)
    await ledger.apply(SetControl(JOB.id, Control.CANCEL, 0))
    await _finish(ledger, JobState.CANCELLED)
    await ledger.apply(SetControl(JOB.id, Control.PAUSE, 0))
    assert (await ledger.job(JOB.id)).control is Control.RUN


@on_every_ledger
async def test_change_for_another_round_has_no_effect(ledger: DumpingLedger) -> None:
    """Stale leaders are harmless. A call from before the retry of a job arrives too late, and a call for an unknown
    round arrives too early."""
    await _failed_job(ledger)
    await ledger.apply(Reopen(JOB.id, 1, [Reopening(RESIZE, 4, 1, 5), Reopening(INDEX, replan=True)]))
    before = await ledger.dump()
    for round_ in (0, 2):
        assert not await set_control(ledger, Control.CANCEL, round=round_)
        assert not (await ledger.apply(MoveJob(JOB.id, JobState.PAUSED, round_))).is_new
        assert not (await ledger.apply(SetPlanned(JOB.id, INDEX, 3, round_))).is_new
        assert not (await ledger.apply(AddCut(cut(9, round=round_)))).is_new
        assert not await _finish(ledger, round=round_)
    assert await ledger.dump() == before
    assert await set_control(ledger, Control.CANCEL, round=1)
    assert await set_control(ledger, Control.CANCEL, round=1), "a second try says the same"
    assert (await ledger.apply(SetPlanned(JOB.id, INDEX, 3, 1))).is_new


@on_every_ledger
async def test_a_cancellation_is_final_within_its_round(ledger: DumpingLedger) -> None:
    await submit(ledger)
    assert await set_control(ledger, Control.PAUSE, round=0)
    assert await set_control(ledger, Control.CANCEL, round=0)
    assert not await set_control(ledger, Control.RUN, round=0)
    assert (await ledger.job(JOB.id)).control is Control.CANCEL


async def _failed_job(ledger: DumpingLedger) -> None:
    """Return a job with 10 planned tasks in its first stage: 4 succeeded, 1 failed, and 5 canceled. The later stages
    are alike or not planned."""
    await submit(ledger)
    await ledger.apply(SetControl(JOB.id, Control.CANCEL, 0))
    await ledger.apply(MoveJob(JOB.id, JobState.RUNNING, 0))
    await ledger.apply(AddCut(replace(cut(0, bundle(0, 5), left=TaskSet.span(5, 10)), planned=10)))
    await ledger.apply(SetPlanned(JOB.id, INDEX, 10, 0))
    await fold(ledger, done(bundle(0, 5), failed=1), done(bundle(0, 4, stage=INDEX)))
    await _finish(ledger, resize=5, index=6)


@on_every_ledger
async def test_results_are_the_parts_of_the_rows(ledger: DumpingLedger) -> None:
    await _failed_job(ledger)
    await ledger.apply(Reopen(JOB.id, 1, [Reopening(RESIZE, failed=1, cancelled=5)]))
    again = replace(bundle(0, 10), tasks=TaskSet.from_indices([0, 5, 6, 9]), round=1)
    await ledger.apply(AddCut(cut(0, again, bundle(100, 101), round=1)))
    await fold(ledger, done(again, bundle(50, 60, stage=INDEX), failed=1, cancelled=1, started_s=1e9 + 0.1, retried=3))
    rows = await ledger.bundles(JOB.id, done=True)
    results = await ledger.results(JOB.id, after_seq=0, limit=10)
    # The ranges of tasks are lists or tuples.
    assert json.dumps(results) == json.dumps([BundleResult.of(row) for row in rows])
    assert [(one.round, one.attempt, one.retried) for one in results] == [(0, 1, 0), (0, 1, 0), (1, 1, 3)]
    page = await ledger.results(JOB.id, after_seq=results[0].seq, limit=1)
    assert [one.seq for one in page] == [results[1].seq]
    assert await ledger.results(JobId("nothing"), after_seq=0, limit=1) == []
    with pytest.raises(ValueError, match="does not have a result"):
        BundleResult.of((await ledger.bundles(JOB.id, done=False))[0])


@on_every_ledger
async def test_new_round_subtracts_what_it_repeats(ledger: DumpingLedger) -> None:
    """A retry repeats only the failed part of a job."""
    await _failed_job(ledger)
    assert (
        await ledger.apply(Reopen(JOB.id, 1, [Reopening(RESIZE, failed=1, cancelled=5), Reopening(INDEX, cancelled=6)]))
    ).is_new
    assert await ledger.job(JOB.id) == JobRecord(JOB, JobState.PENDING, round=1)
    resize, index = await counts_of(ledger), await counts_of(ledger, INDEX)
    assert (resize.planned, resize.succeeded, resize.failed, resize.cancelled) == (10, 4, 0, 0)
    assert (index.planned, index.succeeded, index.terminal) == (10, 4, 4)


@on_every_ledger
async def test_round_begins_once(ledger: DumpingLedger) -> None:
    await _failed_job(ledger)
    taken_back = [Reopening(RESIZE, failed=1, cancelled=5)]
    assert (await ledger.apply(Reopen(JOB.id, 1, taken_back))).is_new
    before = await ledger.dump()
    for round_ in (1, 0):
        assert not (await ledger.apply(Reopen(JOB.id, round_, taken_back))).is_new
    assert await ledger.dump() == before
    await _finish(ledger, round=1)
    assert not (await ledger.apply(Reopen(JOB.id, 1, taken_back))).is_new, "nor after that round's end"


@on_every_ledger
async def test_only_a_job_that_ended_without_success_is_reopened(ledger: DumpingLedger) -> None:
    for state in JobState:
        job = replace(JOB, id=JobId(state.lower()))
        await ledger.apply(AddJob(job, state))
        reopened = (await ledger.apply(Reopen(job.id, 1, []))).is_new
        assert reopened == (state in (JobState.FAILED, JobState.CANCELLED)), state


@on_every_ledger
async def test_a_void_plan_is_unknown_again_and_its_cuts_stay_out(ledger: DumpingLedger) -> None:
    await _failed_job(ledger)
    await ledger.apply(Reopen(JOB.id, 1, [Reopening(RESIZE, 4, 1, 5, replan=True)]))
    record = await stage_of(ledger)
    assert record.counts.planned is None
    assert record.counts.terminal == 0
    assert (record.cut_seq, record.left) == (-1, TaskSet())
    assert not (await ledger.apply(AddCut(replace(cut(0, bundle(0, 5)), planned=10)))).is_new
    assert (await ledger.apply(AddCut(replace(cut(0, round=1, left=TaskSet.span(0, 8)), planned=8)))).is_new
    record = await stage_of(ledger)
    assert (record.plan_round, record.cut_seq, record.counts.planned) == (1, 0, 8)


@on_every_ledger
async def test_bundles_of_a_void_plan_are_unlisted_but_stored(ledger: DumpingLedger) -> None:
    await _failed_job(ledger)
    await ledger.apply(Reopen(JOB.id, 1, [Reopening(RESIZE, 4, 1, 5, replan=True)]))
    listed = [r.bundle.stage for r in await ledger.bundles(JOB.id)]
    assert listed == [INDEX], "another stage's stay"
    assert list(await ledger.bundles(JOB.id, failed=True)) == []
    assert await fold(ledger, done(bundle(0, 5), failed=1)) == [False], "a late event"
    assert (await counts_of(ledger)).terminal == 0
    again = replace(bundle(0, 5), round=1)
    await ledger.apply(AddCut(replace(cut(0, again, round=1), planned=5)))
    assert [r.bundle for r in await ledger.bundles(JOB.id, stage=RESIZE)] == [again]


@on_every_ledger
async def test_rounds_may_follow_each_other_until_all_is_done(ledger: DumpingLedger) -> None:
    """The sums are consistent at the end of every round (I2)."""
    await submit(ledger)
    await ledger.apply(AddCut(replace(cut(0, bundle(0, 4)), planned=4)))
    await fold(ledger, done(bundle(0, 4), failed=4))
    await _finish(ledger)
    for round_ in range(1, 5):
        assert (await ledger.apply(Reopen(JOB.id, round_, [Reopening(RESIZE, failed=5 - round_)]))).is_new
        again = replace(bundle(0, 5 - round_), round=round_)
        assert (await ledger.apply(AddCut(cut(0, again, round=round_)))).is_new
        await fold(ledger, done(again, failed=4 - round_))
        counts = await counts_of(ledger)
        assert (counts.planned, counts.terminal, counts.succeeded) == (4, 4, round_)
        assert await _finish(ledger, JobState.SUCCEEDED if round_ == 4 else JobState.FAILED, round=round_)
    assert not (await ledger.apply(Reopen(JOB.id, 5, []))).is_new


@on_every_ledger
async def test_every_call_may_be_made_twice(ledger: DumpingLedger) -> None:
    """A call is repeated if its answer was lost."""
    async with ledger_in(None) as once:
        for call in CALLS:
            await call(once)
            await call(ledger)
            await call(ledger)
            assert await ledger.dump() == await once.dump()


# --- A job restored ------------------------------------------------------------------------------

PAST = JobHistory(
    JOB,
    JobState.SUBMITTED,
    (
        Round(
            (),
            (replace(cut(0, bundle(0, 4)), planned=10),),
            {INDEX: 10},
            (done(bundle(0, 4), bundle(1, 4, stage=INDEX), failed=1),),
            ({INDEX: 1},),
            Ending(JobState.FAILED, "no luck", 50.0, {RESIZE: 6, INDEX: 9}),
        ),
        Round((Reopening(RESIZE, failed=1, cancelled=6),), (), {}, (), (), None),
    ),
    Control.PAUSE,
)


async def _lived(ledger: DumpingLedger) -> None:
    """Make the calls that lead to the history PAST."""
    first = PAST.rounds[0]
    await submit(ledger)
    await ledger.apply(AddCut(first.cuts[0]))
    await ledger.apply(SetPlanned(JOB.id, INDEX, 10, 0))
    await ledger.apply(Fold(first.completions, first.casualties))
    assert first.ending
    await ledger.apply(Finish(JOB.id, Ending(JobState.FAILED, "no luck", 50.0, first.ending.closed), 0))
    await ledger.apply(Reopen(JOB.id, 1, PAST.rounds[1].reopened))
    await ledger.apply(SetControl(JOB.id, Control.PAUSE, 1))
    await ledger.apply(MoveJob(JOB.id, JobState.PAUSED, 1))


@on_every_ledger
async def test_a_job_restored_is_equal_to_one_that_has_lived(ledger: DumpingLedger) -> None:
    await _lived(ledger)
    grown = await ledger.dump()
    assert await ledger.restore(PAST, over=await ledger.rows(JOB.id))
    assert await ledger.dump() == grown
    await ledger.forget()
    assert await rows_of(ledger) is None
    assert await ledger.restore(PAST, over=None)
    assert await ledger.dump() == grown


@on_every_ledger
async def test_a_job_is_restored_only_as_it_was_seen(ledger: DumpingLedger) -> None:
    seen = [await rows_of(ledger)]
    await submit(ledger)
    seen.append(await rows_of(ledger))
    await ledger.apply(AddCut(cut(0, bundle(0, 4), bundle(4, 8))))
    seen.append(await rows_of(ledger))
    split = replace(done(bundle(0, 4)), succeeded=TaskSet(), run_s=0.0)
    await fold(ledger, split)
    seen.append(await rows_of(ledger))
    await fold(ledger, replace(split, bundle=bundle(4, 8)))  # the split is in no counter
    before = await ledger.dump()
    for rows in seen:
        assert not await ledger.restore(PAST, over=rows)
    assert await ledger.dump() == before


@on_every_ledger
async def test_a_deleted_job_leaves_no_row(ledger: DumpingLedger) -> None:
    await _lived(ledger)
    await ledger.forget([JOB.id])
    await ledger.forget([JOB.id])
    assert await ledger.dump() == {"jobs": [], "stages": [], "bundles": []}
    assert (await ledger.jobs(), await ledger.bundles(JOB.id)) == ([], [])
    for change in (Reopen(JOB.id, 2, ()), Fold([done(bundle(0, 5))], [{}])):
        with pytest.raises(NotFound):
            await ledger.apply(change)


@on_every_ledger
async def test_some_jobs_can_be_forgotten(ledger: DumpingLedger) -> None:
    await submit(ledger)
    before = await ledger.dump()
    other = replace(JOB, id=JobId("photos-2"), token="other")
    await submit(ledger, other)
    await ledger.forget([])
    await ledger.forget([other.id, JobId("unknown")])
    assert await ledger.dump() == before
