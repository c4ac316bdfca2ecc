"""`ledger rebuild`: an equal ledger from the bucket alone (I3)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batchlab.errors import NotFound
from batchlab.jobdef import JobDef
from batchlab.manager.live import Ports
from batchlab.manager.requests import Retry
from batchlab.model import Completion, Control, JobId, JobState
from batchlab.ports import Cut
from batchlab.protocol import definition, naming, settle, wire

_CUT = re.compile(r"^jobs/[^/]+/[^/]+/plan/\d+/cuts/\d+\.json$")
_OUTCOME = re.compile(r"^jobs/[^/]+/[^/]+/outcomes/")
_FOLDED_AT_ONCE = 100


@dataclass(slots=True)
class _Found:
    """Keys of one job, by kind."""

    cuts: list[str] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)
    spec: bool = False


async def rebuild(ports: Ports) -> int:
    """Forget the ledger's jobs and read them from the bucket again; answers how many."""
    await ports.ledger.clear()
    found: dict[JobId, _Found] = defaultdict(_Found)
    async for page in ports.objects.list("jobs/"):
        for info in page:
            job = JobId(info.key.split("/", 2)[1])
            if _CUT.match(info.key):
                found[job].cuts.append(info.key)
            elif _OUTCOME.match(info.key):
                found[job].outcomes.append(info.key)
            elif info.key == naming.spec(job):
                found[job].spec = True
    jobs: list[tuple[JobDef, Cut | None]] = []
    for job in (one for one in found if found[one].spec):
        doc = await _doc(ports, naming.spec(job))
        opening = definition.opening_in(doc)
        jobs.append((wire.job_from_json(doc), opening.cut if opening else None))
    for spec, cut in sorted(jobs, key=lambda one: (one[0].submitted_s, one[0].id)):
        await _rebuild_job(ports, spec, cut, found[spec.id])
    return len(jobs)


async def _rebuild_job(ports: Ports, job: JobDef, opening: Cut | None, found: _Found) -> None:
    ledger = ports.ledger
    later = job.start_at_s is not None and job.start_at_s > ports.clock.now_s()
    await ledger.add_job(job, state=JobState.SCHEDULED if later else JobState.SUBMITTED)
    cuts = [opening] if opening else []
    cuts += [wire.cut_from_json(await _doc(ports, key)) for key in found.cuts]
    # One at a time: a job's values may be more than memory holds, its completions are not.
    completions = [
        settle.completion(wire.outcome_from_json(await _doc(ports, key))) for key in found.outcomes
    ]
    round_ = 0
    while True:
        await _rebuild_round(
            ports,
            job,
            round_,
            [c for c in cuts if c.round == round_],
            [c for c in completions if c.bundle.round == round_],
        )
        round_ += 1
        try:
            data = await ports.patience(partial(ports.objects.get, naming.retry(job.id, round_)))
        except NotFound:
            break
        retry = Retry.from_bytes(data)
        await ledger.reopen(job.id, round_, retry.reopened)
        for cut in retry.cuts:
            await ledger.add_cut(cut)
    await _rebuild_control(ports, job)


async def _rebuild_round(
    ports: Ports, job: JobDef, round_: int, cuts: list[Cut], completions: list[Completion]
) -> None:
    ledger = ports.ledger
    for cut in sorted(cuts, key=lambda c: (c.stage, c.seq)):
        await ledger.add_cut(cut)
        if cut.planned is not None:
            for stage in job.fed_by(cut.stage):
                await ledger.set_planned(job.id, stage.name, cut.planned)
    for i in range(0, len(completions), _FOLDED_AT_ONCE):
        batch = completions[i : i + _FOLDED_AT_ONCE]
        await ledger.fold(batch, [settle.casualties(job, one) for one in batch])
    try:
        doc = await _doc(ports, naming.final(job.id, round_))
    except NotFound:
        return
    await ledger.finish(
        job.id,
        JobState(doc["state"]),
        round=round_,
        reason=doc["reason"],
        ended_s=doc["ended_s"],
        closed=doc["closed"],
    )


async def _rebuild_control(ports: Ports, job: JobDef) -> None:
    try:
        data = await ports.patience(partial(ports.objects.get, naming.control(job.id)))
    except NotFound:
        return
    control = wire.word_from_bytes(data).control
    await ports.ledger.set_control(job.id, control)
    if control is Control.PAUSE:
        await ports.ledger.move_job(job.id, JobState.PAUSED)


async def _doc(ports: Ports, key: str) -> dict[str, Any]:
    return wire.loads(await ports.patience(partial(ports.objects.get, key)))
