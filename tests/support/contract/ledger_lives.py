"""Random lives of jobs, to compare a ledger with the ledger on SQLite."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from random import Random
from typing import Any

from batchlab.core.errors import NotFound
from batchlab.core.model import Control, JobId, JobState
from batchlab.core.ports import (
    AddCut,
    AddJob,
    Ending,
    Finish,
    Fold,
    Ledger,
    MoveJob,
    Reopen,
    Reopening,
    SetControl,
    SetPlanned,
)
from tests.support.contract.ledger_suite import INDEX, JOB, RESIZE, TOTAL, bundle, cut, done

Call = Callable[[Ledger], Awaitable[object]]


async def answer(call: Call, ledger: Ledger) -> object:
    try:
        return await call(ledger)
    except NotFound:
        return NotFound


def anything(rng: Random) -> Call:
    """Return one random call, usually for an existing job."""
    job = replace(JOB, id=JobId(rng.choice(("a", "a", "b"))))
    stage = rng.choice((RESIZE, INDEX, TOTAL))

    def some() -> Any:
        start, attempt = rng.randrange(6), rng.randint(1, 2)
        of = bundle(start, start + rng.randint(1, 3), stage=stage, attempt=attempt)
        return replace(of, job=job.id, round=rng.randint(0, 1))

    round_ = rng.randint(0, 2)
    cuts = replace(
        cut(rng.randint(0, 3), *{b.id: b for b in (some(), some())}.values(), round=round_),
        job=job.id,
        stage=stage,
        planned=rng.choice((None, 9)),
    )
    completions = [
        done(some(), replace(some(), stage=INDEX), failed=rng.randint(0, 1)) for _ in range(rng.randint(1, 4))
    ]
    lost = [{TOTAL: rng.randint(0, 2)} for _ in completions]
    state, word = rng.choice(list(JobState)), rng.choice(list(Control))
    closed = {RESIZE: rng.randint(0, 3)}
    taken = [Reopening(stage, succeeded=1, replan=rng.random() < 0.5)]

    async def folded(of: Ledger) -> object:
        return list((await of.apply(Fold(completions, lost))).new)

    def finish(of: Ledger) -> Awaitable[object]:
        return of.apply(Finish(job.id, Ending(state, "r", 1.0, closed), round_))

    calls: list[Call] = [
        lambda of: of.apply(AddJob(job, JobState.SUBMITTED)),
        lambda of: of.apply(AddJob(job, state, replace(cuts, round=0))),
        lambda of: of.apply(MoveJob(job.id, state, round_)),
        lambda of: of.apply(SetControl(job.id, word, round_)),
        lambda of: of.apply(AddCut(cuts)),
        lambda of: of.apply(SetPlanned(job.id, stage, 7, round_)),
        folded,
        folded,
        folded,
        finish,
        finish,
        lambda of: of.apply(Reopen(job.id, round_, taken)),
        lambda of: of.forget([job.id]),
    ]
    return rng.choice(calls)
