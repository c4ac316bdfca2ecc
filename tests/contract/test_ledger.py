"""The contract of every Ledger adapter for jobs, stages, cuts, and leases."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import NotFound
from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import ENDED, Control, FailureKind, JobId, JobState, StageCounts, StageName, TaskSet, may_move
from batchlab.core.ports import (
    AddCut,
    AddJob,
    ChangeResult,
    Cut,
    Ending,
    Finish,
    Fold,
    JobRecord,
    JobRows,
    MoveJob,
    Reopen,
    SetControl,
    SetPlanned,
    StageRecord,
)
from batchlab.core.retry_rule import RetryRule
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
    ledger_in,
    on_every_ledger,
    stage_of,
    submit,
)

NOBODY = JobId("nobody")


# --- Jobs ----------------------------------------------------------------------------------------


@on_every_ledger
async def test_new_job_has_its_stages_in_order(ledger: DumpingLedger) -> None:
    written = await ledger.apply(AddJob(JOB, JobState.SUBMITTED))
    assert await ledger.job(JOB.id) == JobRecord(JOB, JobState.SUBMITTED)
    stages = tuple(StageRecord(StageCounts(name)) for name in (RESIZE, INDEX, TOTAL))
    assert await ledger.rows(JOB.id) == JobRows(JobRecord(JOB, JobState.SUBMITTED), stages)
    assert written == ChangeResult(await ledger.rows(JOB.id), is_new=True)
    assert list(await ledger.bundles(JOB.id)) == []


@on_every_ledger
async def test_job_is_returned_as_defined(ledger: DumpingLedger) -> None:
    rule = RetryRule(5, 0.1, kinds=(FailureKind.EXIT,), exit_codes=(75,), exceptions=("OSError",))
    job = JobDef(
        JobId("rich"),
        "Größe \N{RIGHTWARDS ARROW} 漢字 '; --",
        (StageDef(StageName("s"), command=("sh", "-c", "\0"), retry=rule, memory_bytes=2**40),),
        submitted_s=1_700_000_000.123456,
        input=InputDef(("raw/a", "raw/b/"), SplitBy.LINES, 100, header=True),
        code="code/0.zip",
        params=(("p", {"deep": [1, None, 2.5]}),),
        max_failures=0.1,
        max_failures_percent=True,
        priority=-3,
        tags=(("team", "x"),),
        token="t",
        start_at_s=1_800_000_000.1,
    )
    await submit(ledger, job)
    assert (await ledger.job(job.id)).job == job


@on_every_ledger
async def test_missing_job_is_not_found(ledger: DumpingLedger) -> None:
    await submit(ledger)
    stranger = replace(bundle(0, 1), job=NOBODY)
    for call in (
        ledger.job(NOBODY),
        ledger.rows(NOBODY),
        ledger.apply(MoveJob(NOBODY, JobState.RUNNING, 0)),
        ledger.apply(SetControl(NOBODY, Control.PAUSE, 0)),
        ledger.apply(SetPlanned(NOBODY, RESIZE, 1, 0)),
        ledger.apply(SetPlanned(JOB.id, StageName("elsewhere"), 1, 0)),
        ledger.apply(AddCut(Cut(NOBODY, RESIZE, 0, 0, (stranger,), TaskSet()))),
        ledger.apply(Reopen(NOBODY, 1, [])),
        ledger.apply(Finish(NOBODY, Ending(JobState.FAILED, "", 1.0, {}), 0)),
        ledger.apply(Fold([done(stranger)], [{}])),
        ledger.jobs(before=NOBODY),
    ):
        with pytest.raises(NotFound):
            await call
    assert list(await ledger.bundles(NOBODY)) == []


@on_every_ledger
async def test_adding_a_job_again_answers_with_what_became_of_it(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await ledger.apply(SetPlanned(JOB.id, RESIZE, 7, 0))
    await ledger.apply(MoveJob(JOB.id, JobState.RUNNING, 0))
    before = await ledger.dump()
    again = await ledger.apply(AddJob(replace(JOB, name="changed"), JobState.SCHEDULED))
    assert again.rows.job == JobRecord(JOB, JobState.RUNNING)
    assert again == ChangeResult(await ledger.rows(JOB.id), is_new=False)
    assert await ledger.dump() == before


@on_every_ledger
async def test_a_client_token_makes_one_job(ledger: DumpingLedger) -> None:
    """A client that did not receive an answer submits the job again."""
    first = replace(JOB, token="once")
    await submit(ledger, first)
    second = await ledger.apply(AddJob(replace(first, id=JobId("other")), JobState.SUBMITTED))
    assert (second.rows.job.job, second.is_new) == (first, False)
    assert [rows.id for rows in await ledger.jobs()] == [first.id]


@on_every_ledger
async def test_jobs_without_a_token_are_different_jobs(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await submit(ledger, replace(JOB, id=JobId("other")))
    assert len(await ledger.jobs()) == 2


def _jobs(count: int) -> list[JobDef]:
    """Return pairs of jobs that were submitted at the same moment."""
    return [replace(JOB, id=JobId(f"j-{i:02d}"), submitted_s=1_000.0 + i // 2) for i in range(count)]


@on_every_ledger
async def test_jobs_are_listed_newest_first_and_by_id_within_a_moment(ledger: DumpingLedger) -> None:
    for job in sorted(_jobs(6), key=lambda job: str(job.id)[::-1], reverse=True):
        await submit(ledger, job)
    listed = [rows.id for rows in await ledger.jobs()]
    assert listed == ["j-05", "j-04", "j-03", "j-02", "j-01", "j-00"]


@on_every_ledger
async def test_listed_rows_are_the_rows_of_each_job_without_a_stamp(ledger: DumpingLedger) -> None:
    first, second = _jobs(2)
    await submit(ledger, first)
    await submit(ledger, second)
    bundles = (replace(bundle(0, 2), job=first.id),)
    await ledger.apply(AddCut(Cut(first.id, RESIZE, 0, 0, bundles, TaskSet.span(2, 5), 5)))
    listed = await ledger.jobs()
    assert list(listed) == [await ledger.rows(second.id), await ledger.rows(first.id)]
    assert listed[1].stages[0].left == TaskSet.span(2, 5)
    assert not (await ledger.rows(first.id)).is_version(listed[1])


@on_every_ledger
async def test_bundles_of_several_jobs_are_read_at_once(ledger: DumpingLedger) -> None:
    first, second, third = _jobs(3)
    for job in (first, second, third):
        await submit(ledger, job)
        own = replace(bundle(0, 2), job=job.id), replace(bundle(2, 3), job=job.id)
        await ledger.apply(AddCut(Cut(job.id, RESIZE, 0, 0, own, TaskSet(), 3)))
    for job in (second, first):
        await fold(ledger, done(replace(bundle(0, 2), job=job.id)))
    planned = await ledger.bundles(first.id, second.id, NOBODY, done=False)
    assert sorted((r.bundle.job, r.bundle.tasks) for r in planned) == [
        (first.id, TaskSet.span(2, 3)),
        (second.id, TaskSet.span(2, 3)),
    ]
    folded = await ledger.bundles(first.id, second.id, third.id, done=True)
    assert [r.bundle.job for r in folded] == [second.id, first.id]
    assert list(await ledger.bundles(done=False)) == []


@on_every_ledger
async def test_pages_of_jobs_list_each_job_once_during_submissions(ledger: DumpingLedger) -> None:
    for job in _jobs(7):
        await submit(ledger, job)
    seen: list[str] = []
    while page := await ledger.jobs(limit=3, before=seen[-1] if seen else None):
        assert len(seen) < 7
        seen += [rows.id for rows in page]
        await submit(ledger, replace(JOB, id=JobId(f"late-{len(seen)}"), submitted_s=2_000.0))
    assert seen == [f"j-{i:02d}" for i in range(6, -1, -1)]


@on_every_ledger
async def test_active_jobs_are_those_that_have_not_ended(ledger: DumpingLedger) -> None:
    for state in JobState:
        await ledger.apply(AddJob(replace(JOB, id=JobId(state.lower())), state))
    active = {rows.job.state for rows in await ledger.jobs(active=True)}
    assert active == set(JobState) - ENDED
    assert len(await ledger.jobs()) == len(JobState)


@pytest.mark.parametrize("before", list(JobState))
def test_a_job_moves_by_the_table_of_moves(before: JobState, tmp_path: Path) -> None:
    async def main() -> None:
        async with ledger_in(tmp_path / "ledger.sqlite") as ledger:
            for after in JobState:
                job = replace(JOB, id=JobId(f"to-{after}"))
                await ledger.apply(AddJob(job, before))
                moved = (await ledger.apply(MoveJob(job.id, after, 0))).is_new
                assert moved == may_move(before, after)
                record = await ledger.job(job.id)
                assert (record.state, record.reason) == (after if moved else before, "")

    asyncio.run(main())


@on_every_ledger
async def test_control_is_the_last_one_set(ledger: DumpingLedger) -> None:
    await submit(ledger)
    for control in (Control.PAUSE, Control.PAUSE, Control.RUN, Control.CANCEL):
        await ledger.apply(SetControl(JOB.id, control, 0))
        assert (await ledger.job(JOB.id)).control is control


# --- Cuts ----------------------------------------------------------------------------------------


@on_every_ledger
async def test_cut_plans_its_bundles_and_updates_the_rest(ledger: DumpingLedger) -> None:
    await submit(ledger)
    one, other = bundle(0, 10), bundle(20, 30)
    left = TaskSet(((30, 40), (50, 90)))
    planned = replace(cut(0, one, other, left=left), planned=90)
    assert (await ledger.apply(AddCut(planned))).is_new
    assert await stage_of(ledger) == StageRecord(StageCounts(RESIZE, planned=90), cut_seq=0, left=left)
    records = await ledger.bundles(JOB.id)
    assert [(r.bundle, r.completion, r.seq) for r in records] == [(one, None, None), (other, None, None)]


@on_every_ledger
async def test_a_cut_makes_a_job_runnable_and_an_outcome_makes_it_running(ledger: DumpingLedger) -> None:
    """An event changes the state of a job, but does not change a state that a user has set."""
    for state in (one for one in JobState if not one.ended):
        job, of = replace(JOB, id=JobId(state.lower())), bundle(0, 5)
        of = replace(of, job=job.id)
        await ledger.apply(AddJob(job, state))
        rows = (await ledger.apply(AddCut(replace(cut(0, of), job=job.id)))).rows
        is_new = state in (JobState.SUBMITTED, JobState.PENDING)
        assert rows.job.state is (JobState.RUNNABLE if is_new else state)
        folded = await ledger.apply(Fold([done(of)], [{}]))
        assert folded.jobs == {job.id: await ledger.rows(job.id)}
        waited = is_new or state in (JobState.RUNNABLE, JobState.STARTING)
        assert folded.jobs[job.id].job.state is (JobState.RUNNING if waited else state)


@on_every_ledger
async def test_repeated_or_older_cut_changes_nothing(ledger: DumpingLedger) -> None:
    await submit(ledger)
    first = replace(cut(0, bundle(0, 5), left=TaskSet.span(5, 9)), planned=9)
    second = cut(1, bundle(5, 7), left=TaskSet.span(7, 9))
    assert (await ledger.apply(AddCut(first))).is_new
    assert (await ledger.apply(AddCut(second))).is_new
    before = await ledger.dump()
    for known in (first, second, replace(first, bundles=(bundle(8, 9),))):
        assert not (await ledger.apply(AddCut(known))).is_new
    assert await ledger.dump() == before


@on_every_ledger
async def test_a_later_rounds_cut_takes_over_and_counts_from_its_own(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await ledger.apply(AddCut(replace(cut(0), planned=40)))
    await ledger.apply(AddCut(cut(7)))
    later = cut(0, round=2, left=TaskSet.span(3, 9))
    assert not (await ledger.apply(AddCut(later))).is_new, "the job is not in that round"
    await ledger.apply(Finish(JOB.id, Ending(JobState.FAILED, "", 1.0, {RESIZE: 40}), 0))
    assert (await ledger.apply(Reopen(JOB.id, 2, []))).is_new
    assert (await ledger.apply(AddCut(later))).is_new
    record = await stage_of(ledger)
    assert (record.plan_round, record.cut_seq, record.left) == (2, 0, TaskSet.span(3, 9))
    assert record.counts.planned == 40, "a cut without `planned` leaves it"
    for old in (cut(8), cut(0, round=1), cut(99, round=1)):
        assert not (await ledger.apply(AddCut(old))).is_new


@on_every_ledger
async def test_a_cut_leaves_a_bundle_that_is_done_already(ledger: DumpingLedger) -> None:
    await submit(ledger)
    early = done(bundle(0, 5))
    await fold(ledger, early)
    assert (await ledger.apply(AddCut(cut(0, bundle(0, 5), bundle(5, 6))))).is_new
    records = await ledger.bundles(JOB.id)
    assert [r.completion for r in records] == [early, None]


@on_every_ledger
async def test_planned_count_is_set_if_it_was_unknown(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await ledger.apply(SetPlanned(JOB.id, INDEX, 5, 0))
    await ledger.apply(SetPlanned(JOB.id, INDEX, 6, 0))
    assert (await counts_of(ledger, INDEX)).planned == 5
    assert (await counts_of(ledger, RESIZE)).planned is None


# --- Leases, and forgetting ----------------------------------------------------------------------


@on_every_ledger
async def test_only_the_owner_renews_a_lease(ledger: DumpingLedger) -> None:
    first = await ledger.lease("leader", "a")
    assert first.owner == "a"
    assert await ledger.lease("leader", "b") == first, "b is told, and nothing changes"
    renewed = await ledger.lease("leader", "a")
    assert (renewed.owner, renewed != first) == ("a", True)


@on_every_ledger
async def test_a_lease_is_taken_over_only_as_it_was_seen(ledger: DumpingLedger) -> None:
    seen = await ledger.lease("leader", "a")
    renewed = await ledger.lease("leader", "a")
    assert await ledger.lease("leader", "b", over=seen) == renewed, "it was renewed since"
    taken = await ledger.lease("leader", "b", over=renewed)
    assert taken.owner == "b"
    assert await ledger.lease("leader", "c", over=renewed) == taken, "one of two takes it over"
    assert await ledger.lease("leader", "a") == taken, "a renewal is no taking over"


@on_every_ledger
async def test_a_lease_given_back_is_free_at_once(ledger: DumpingLedger) -> None:
    await ledger.lease("leader", "a")
    await ledger.release("leader", "b")
    assert (await ledger.lease("leader", "b")).owner == "a", "not b's to give back"
    await ledger.release("leader", "a")
    await ledger.release("leader", "a")
    assert (await ledger.lease("leader", "b")).owner == "b"


@on_every_ledger
async def test_beat_of_a_lease_shows_a_change_of_owner(ledger: DumpingLedger) -> None:
    first = await ledger.lease("leader", "a")
    assert (await ledger.lease("leader", "a")).beat == first.beat + 1
    await ledger.release("leader", "a")
    await ledger.lease("leader", "b")
    await ledger.release("leader", "b")
    again = await ledger.lease("leader", "a")
    assert (again.owner, again.beat > first.beat + 2) == ("a", True)


@on_every_ledger
async def test_leases_of_other_names_are_other_leases(ledger: DumpingLedger) -> None:
    assert (await ledger.lease("leader", "a")).owner == "a"
    assert (await ledger.lease("scheduler", "b")).owner == "b"


@on_every_ledger
async def test_all_jobs_can_be_forgotten_and_the_leases_stay(ledger: DumpingLedger) -> None:
    await submit(ledger)
    await fold(ledger, done(bundle(0, 5), bundle(0, 5, stage=INDEX)))
    held = await ledger.lease("leader", "a")
    last = max(r.seq or 0 for r in await ledger.bundles(JOB.id))
    await ledger.forget()
    assert await ledger.dump() == {"jobs": [], "stages": [], "bundles": []}
    assert await ledger.lease("leader", "b") == held
    await submit(ledger)
    await fold(ledger, done(bundle(0, 5)))
    assert await ledger.bundles(JOB.id, after_seq=last), "a watcher goes on where it was"
