"""The ledger in memory, compared with the ledger on SQLite call by call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from batchlab.adapters.memory.ledger import SimLedger
from batchlab.core.errors import NotFound
from batchlab.core.model import Completion, Control, JobId, JobState, StageName
from batchlab.core.ports import AddJob, Ending, Fold, JobHistory, JobRows, Ledger, Reopen, Reopening, Round
from batchlab.core.protocol import json_format, settlement
from batchlab.sim.event_loop import SimLoop
from tests.support.contract.ledger_lives import Call, answer, anything
from tests.support.contract.ledger_suite import (
    INDEX,
    JOB,
    RESIZE,
    TOTAL,
    DumpingLedger,
    bundle,
    done,
    history,
    ledger_in,
    rows_of,
    submit,
)

JOBS = (JobId("a"), JobId("b"), JOB.id, JobId("never"))


@pytest.mark.parametrize("seed", range(30))
def test_random_lives_are_those_of_the_sql_ledger(seed: int) -> None:
    """The test compares every answer and, after each call, the whole content of both ledgers."""
    rng = Random(seed)

    async def main() -> None:
        memory = SimLedger()
        async with ledger_in(None) as sql:
            for _ in range(60):
                call = rng.choice((anything, _more))(rng)
                before = [_version(await rows_of(memory, job)) for job in JOBS], await memory.dump()
                answers = [await answer(call, of) for of in (sql, memory)]
                assert answers[0] == answers[1]
                for read in _reads(rng):
                    assert await answer(read, memory) == await answer(read, sql)
                assert await memory.dump() == await sql.dump()
                after = [_version(await rows_of(memory, job)) for job in JOBS], await memory.dump()
                assert after[0] != before[0] or after[1] == before[1], "a change has its version"

    SimLoop().run(main())


def _version(rows: JobRows | None) -> object:
    return rows and (rows, rows.stamp)


def _more(rng: Random) -> Call:
    """Return calls for one writer, whose answers contain details that may differ with two writers."""
    job, round_ = rng.choice(JOBS), rng.randint(0, 2)
    owner, over = rng.choice("ab"), rng.random() < 0.3
    some = [_completion(rng, rng.choice(JOBS[:2])) for _ in range(rng.randint(1, 6))]
    lost = [{rng.choice((INDEX, TOTAL, RESIZE)): rng.randint(0, 2)} for _ in some]
    past, stale = _past(rng), rng.random() < 0.2
    token = replace(JOB, id=rng.choice(JOBS[:2]), token=rng.choice(("", "t", "u")))

    async def lease(of: Ledger) -> object:
        stands = await of.lease("leader", "c")
        return await of.lease("leader", owner, over=stands if over else None)

    async def restore(of: Ledger) -> object:
        rows = await rows_of(of, past.job.id)
        if stale and rows:
            rows = replace(rows, stamp=f"{rows.stamp} stale")
        return await of.restore(past, over=rows)

    calls: Sequence[Call] = (
        lambda of: of.apply(Fold(some, lost)),
        lambda of: of.apply(Fold(some, lost)),
        lambda of: of.apply(AddJob(token, JobState.SCHEDULED)),
        lambda of: of.apply(Reopen(job, round_, [Reopening(RESIZE, 1), Reopening(INDEX, replan=True)])),
        lambda of: of.release("leader", owner),
        lambda of: of.forget(),
        lambda of: of.jobs(before=job),
        lease,
        lease,
        restore,
        restore,
        restore,
    )
    return rng.choice(calls)


def _completion(rng: Random, job: JobId) -> Completion:
    start, stage = rng.randrange(8), rng.choice((RESIZE, INDEX))
    of = replace(bundle(start, start + rng.randint(1, 3), stage=stage), job=job)
    failed, dropped = rng.choice(((0, 0), (1, 0), (0, 1)))
    follows = [replace(of, stage=INDEX)] if rng.random() < 0.4 else []
    run_s, retried = rng.randint(0, 10**7) / 1e6, rng.randint(0, 2)
    return done(of, *follows, failed=failed, cancelled=dropped, run_s=run_s, started_s=1e9 - start, retried=retried)


def _past(rng: Random) -> JobHistory:
    """Return a part of a job's life that follows the protocol's rules, with a second round in some cases."""
    cuts, completions = history(rng, 9)
    # The values have microsecond precision, as in a message, because the ledger in memory does not round values.
    some = [
        json_format.completion_from_json(json_format.completion_to_json(completion))
        for completion in completions[: rng.randint(0, len(completions))]
    ]
    lost = tuple(settlement.casualties(JOB, one) for one in some)
    end = Ending(JobState.FAILED, "no luck", 50.0, {RESIZE: 2, TOTAL: 1})
    rounds = [Round((), tuple(cuts), {INDEX: 9}, tuple(some), lost, end)]
    if rng.random() < 0.5:
        again = Reopening(INDEX, failed=1, replan=rng.random() < 0.5)
        rounds.append(Round((again,), (), {}, (), (), None))
    control = rng.choice((Control.RUN, Control.PAUSE))
    job = replace(JOB, token=rng.choice(("", "t")))
    return JobHistory(job, JobState.SUBMITTED, tuple(rounds), control)


def _reads(rng: Random) -> Sequence[Call]:
    job, stage = rng.choice(JOBS), rng.choice((None, RESIZE, INDEX))
    done_, failed = rng.choice((None, True, False)), rng.random() < 0.3
    after, limit = rng.choice((None, -1, rng.randrange(100))), rng.choice((None, 1, 5))
    last = rng.choice((None, None, job))
    return (
        lambda of: of.rows(job),
        lambda of: of.job(job),
        lambda of: of.jobs(active=failed, limit=limit or 9, before=last),
        lambda of: of.bundles(job, stage=stage, done=done_, after_seq=after, failed=failed, limit=limit),
    )


async def _raises_and_changes_nothing(ledger: DumpingLedger, call: Call) -> None:
    before, rows = await ledger.dump(), await ledger.rows(JOB.id)
    with pytest.raises(NotFound):
        await call(ledger)
    assert await ledger.dump() == before
    assert rows.is_version(await ledger.rows(JOB.id))


def test_a_call_that_raises_has_changed_nothing() -> None:
    """The ledger in memory cannot roll back, so it checks all arguments first."""
    odd = replace(bundle(0, 5), stage=StageName("elsewhere"))
    rounds = [Round((), (), {}, (), (), None)]

    async def main() -> None:
        ledger = SimLedger()
        await submit(ledger, replace(JOB, id=JobId("other"), token="t"))
        await submit(ledger)
        fine = done(bundle(0, 5))
        past = JobHistory(replace(JOB, token="t"), JobState.SUBMITTED, rounds, Control.RUN)
        rows = await ledger.rows(JOB.id)
        for call in (
            lambda of: of.apply(Fold([fine, done(bundle(5, 6), odd)], [{}, {}])),
            lambda of: of.apply(Fold([fine, done(odd)], [{}, {}])),
            lambda of: of.restore(past, over=rows),
        ):
            await _raises_and_changes_nothing(ledger, call)

    SimLoop().run(main())
