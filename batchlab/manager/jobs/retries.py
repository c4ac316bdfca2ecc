"""What `job retry` takes back and runs again: all that did not succeed, or a choice of failures.

Invariant: a retry is one object in the bucket, and a function of what the ledger said when it was
planned; whoever finds it there carries out that one, whatever had been asked of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from batchlab.core.errors import Malformed, Refused, Unreachable
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobId, StageCounts, StageName, TaskSet
from batchlab.core.ports import Cut, JobRecord, Reopening, StageRecord
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, listed
from batchlab.core.protocol.settlement import judge
from batchlab.core.task_names import task_name
from batchlab.manager.events.quarantine import UnreadableObject, read_stored
from batchlab.manager.jobs.stage_plans import Plans, successes
from batchlab.manager.state import Ports

Chosen = Mapping[StageName, TaskSet]
"""Failed tasks by stage."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The content of a retry object: what is taken back, and what runs again."""

    reopened: tuple[Reopening, ...]
    cuts: tuple[Cut, ...]

    def to_bytes(self) -> bytes:
        return json_format.to_bytes(
            {
                "v": json_format.VERSION,
                "reopened": [json_format.reopening_to_json(r) for r in self.reopened],
                "cuts": [json_format.cut_to_json(c) for c in self.cuts],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Retry:
        return cls.from_json(json_format.loads(data))

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Retry:
        """Return the retry in a document; Malformed if it is not one."""
        try:
            return cls(
                tuple([json_format.reopening_from_json(r) for r in listed(doc["reopened"])]),
                tuple([json_format.cut_from_json(c) for c in listed(doc["cuts"])]),
            )
        except UNREADABLE as error:
            raise Malformed(f"A retry cannot be read: {json_format.brief(error)}.") from error

    def redone(self, stage: StageName) -> TaskSet:
        """Tasks of the stage that it runs again, or plans anew with the stage itself."""
        mine = [cut for cut in self.cuts if cut.stage == stage]
        return TaskSet.union(
            [*(cut.left for cut in mine), *(b.tasks for cut in mine for b in cut.bundles)]
        )


async def cuts_of_round(ports: Ports, record: JobRecord) -> tuple[Cut, ...]:
    """The cuts that the retry which began the job's present round committed to."""
    if not record.round:
        return ()
    return (await read_retry(ports, record.job, record.round)).cuts


async def read_retry(ports: Ports, job: JobDef, round_: int) -> Retry:
    """Return the retry that began the round of the job. NotFound; UnreadableObject if it cannot be
    read, or cuts or takes back what is not of that job and round."""
    key = object_keys.retry(job.id, round_)
    retry = await read_stored(ports, key, Retry.from_bytes)
    stages = {stage.name for stage in job.stages}
    for cut in retry.cuts:
        if (cut.job, cut.round) != (job.id, round_) or cut.stage not in stages:
            raise UnreadableObject(key, "It has a cut of another job, stage or round.")
    if any(one.stage not in stages for one in retry.reopened):
        raise UnreadableObject(key, "It takes back a stage that the job does not have.")
    return retry


@dataclass(frozen=True, slots=True)
class TakenBack:
    """What the retries of a job have run again, by round from 1."""

    by_round: tuple[Retry, ...]

    @classmethod
    async def of(cls, ports: Ports, record: JobRecord) -> TakenBack:
        """Those of the rounds that the record knows of."""
        rounds = range(1, record.round + 1)
        return cls(tuple([await read_retry(ports, record.job, number) for number in rounds]))

    def after(self, round_: int, stage: StageName) -> TaskSet:
        """Tasks of the stage that have run, or are to run, again since `round_`."""
        return TaskSet.union(retry.redone(stage) for retry in self.by_round[round_:])

    def standing(self, bundle: Bundle, failed: TaskSet) -> TaskSet:
        """Of the tasks that failed in the bundle, those that no later retry has taken back."""
        return failed - self.after(bundle.round, bundle.stage) if self.by_round else failed


async def failed_tasks(ports: Ports, record: JobRecord) -> dict[StageName, TaskSet]:
    """The tasks that stand as failed, by stage."""
    taken = await TakenBack.of(ports, record)
    found: dict[StageName, list[TaskSet]] = {}
    for row in await ports.ledger.bundles(record.job.id, failed=True):
        if row.completion:
            standing = taken.standing(row.bundle, row.completion.failed)
            found.setdefault(row.bundle.stage, []).append(standing)
    return {stage: tasks for stage, sets in found.items() if (tasks := TaskSet.union(sets))}


@dataclass(slots=True)
class _Walk:
    """What has been decided of the stages so far, in the order of the list."""

    kept: Chosen
    """Failures that stay as they are."""
    void: set[StageName] = field(default_factory=set)
    redone: set[StageName] = field(default_factory=set)
    out: dict[StageName, TaskSet] = field(default_factory=dict)
    """Tasks without a result after the retry, as far as that is known: what stays failed, and
    what follows from that item by item."""


class RetryPlanner:
    """Plans retries."""

    def __init__(self, ports: Ports, plans: Plans) -> None:
        self._ports = ports
        self._plans = plans

    async def plan(self, record: JobRecord, chosen: Chosen | None) -> Retry:
        """What the job's next round takes back and runs: with `chosen` only those of its failures,
        and in any case what was cancelled. Refused where that would be nothing."""
        round_ = record.round + 1
        rows = await self._ports.ledger.rows(record.job.id)
        stages = {s.counts.stage: s for s in rows.stages}
        walk = _Walk({} if chosen is None else await self._kept(record, stages, chosen))
        reopened: list[Reopening] = []
        cuts: list[Cut] = []
        for stage in record.job.stages:
            before = stages[stage.name]
            if _is_void(stage, before, walk):
                walk.void.add(stage.name)
                reopened.append(_voided(before))
                continue
            upstream = walk.out.get(stage.after[0], TaskSet()) if stage.chained else TaskSet()
            kept = walk.kept.get(stage.name, TaskSet())
            walk.out[stage.name] = TaskSet.union((upstream, kept))
            counts = before.counts
            # Forged outcomes may have counted more tasks than there are.
            failed = max(0, counts.failed - len(kept))
            cancelled = max(0, counts.cancelled - len(upstream))
            if counts.planned is not None and not failed and not cancelled:
                continue
            walk.redone.add(stage.name)
            reopened.append(Reopening(stage.name, failed=failed, cancelled=cancelled))
            cut = await self._redo(record, stage, stages, round_, walk.out[stage.name])
            if cut:
                cuts.append(cut)
        if rows.job != record or await self._ports.ledger.rows(record.job.id) != rows:
            raise Unreachable(f"The ledger changes while job {record.job.id} is read from it.")
        return Retry(tuple(reopened), tuple(cuts))

    async def _kept(
        self, record: JobRecord, stages: Mapping[StageName, StageRecord], chosen: Chosen
    ) -> Chosen:
        """The failures that are not chosen."""
        failed = await failed_tasks(self._ports, record)
        for name, before in stages.items():
            if len(failed.get(name, TaskSet())) != before.counts.failed:
                raise Unreachable(
                    f"The ledger lacks failures of stage {name} of job {record.job.id}.",
                    remedy="If nobody is rebuilding it, `batchlab ledger rebuild` does.",
                )
        for name, tasks in chosen.items():
            if others := tasks - failed.get(name, TaskSet()):
                raise Refused(
                    f"Task {task_name(name, others.first)} of job {record.job.id} has not failed.",
                    remedy="`batchlab job failures` lists those that have.",
                )
        if not any(chosen.values()):
            raise Refused(
                f"No failed task of job {record.job.id} is what was asked for.",
                remedy="`batchlab job failures` lists those that there are.",
            )
        kept = {name: tasks - chosen.get(name, TaskSet()) for name, tasks in failed.items()}
        left = [
            replace(one.counts, failed=len(kept.get(name, TaskSet())))
            for name, one in stages.items()
        ]
        if (verdict := judge(record.job, left)).stop:
            raise Refused(
                f"The failures that would stay stop job {record.job.id} at once, by its own "
                f"policy: {verdict.reason}.",
                remedy="Retry all of them together.",
            )
        return kept

    async def _redo(
        self,
        record: JobRecord,
        stage: StageDef,
        stages: Mapping[StageName, StageRecord],
        round_: int,
        out: TaskSet,
    ) -> Cut | None:
        job, before, now_s = record.job, stages[stage.name], self._ports.clock.now_s()
        mine = await self._succeeded(job.id, before.counts)
        if not stage.chained:
            planned = await self._planned_tasks(record, stage, before.counts)
            return Cut(job.id, stage.name, round_, 0, (), planned - mine - out, at_s=now_s)
        # Tasks whose input is there but whose own result is not; the others come by the chain.
        bundles = []
        for row in await successes(self._ports, job.id, stages[stage.after[0]].counts):
            tasks = (row.completion.succeeded if row.completion else TaskSet()) - mine - out
            if tasks:
                source = row.bundle.id
                bundles.append(Bundle(job.id, stage.name, tasks, round=round_, source=source))
        if not bundles:
            return None
        return Cut(job.id, stage.name, round_, 0, tuple(bundles), TaskSet(), at_s=now_s)

    async def _succeeded(self, job: JobId, counts: StageCounts) -> TaskSet:
        rows = await successes(self._ports, job, counts)
        return TaskSet.union(r.completion.succeeded for r in rows if r.completion)

    async def _planned_tasks(
        self, record: JobRecord, stage: StageDef, counts: StageCounts
    ) -> TaskSet:
        for earlier in range(record.round, -1, -1):
            manifest = await self._plans.existing(record.job, stage.name, earlier)
            if manifest:
                return TaskSet.span(0, manifest.count) - manifest.skipped
        return TaskSet.span(0, counts.planned or 0)


def _is_void(stage: StageDef, before: StageRecord, walk: _Walk) -> bool:
    """Whether the stage's plan stands on results that change: then it is planned anew."""
    changed = bool(walk.void.intersection(stage.after))
    if stage.gather is not None or len(stage.after) > 1:
        changed = changed or bool(walk.redone.intersection(stage.after))
    if not stage.chained:
        changed = changed or not before.counts.planned
    return changed


def _voided(before: StageRecord) -> Reopening:
    counts = before.counts
    return Reopening(counts.stage, counts.succeeded, counts.failed, counts.cancelled, replan=True)
