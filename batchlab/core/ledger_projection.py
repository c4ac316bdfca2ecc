"""Ledger projection: pure functions that apply changes to the rows of one job.

Invariant: every ledger loads the rows of a job, calls the functions of this module, and stores the results, so all
ledgers follow the same rules. The functions of the module do no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, assert_never

from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import (
    Bundle,
    BundleId,
    Completion,
    Control,
    JobId,
    JobState,
    Json,
    StageCounts,
    StageName,
    TaskSet,
    may_move,
)
from batchlab.core.ports import (
    AddCut,
    AddJob,
    BundleRecord,
    Cut,
    Finish,
    Fold,
    JobChange,
    JobHistory,
    JobRecord,
    JobRows,
    MoveJob,
    Reopen,
    Reopening,
    SetControl,
    SetPlanned,
    StageRecord,
)
from batchlab.core.protocol import json_format

US = 1_000_000
"""Number of microseconds in a second."""
NEVER = -1
"""Value of `void_at` for a stage whose plan was never replaced by a retry."""

Key = tuple[StageName, BundleId]
Known = dict[Key, bool]
"""Map of a job's existing bundles to whether each bundle is done."""

_WAITING = (JobState.SUBMITTED, JobState.PENDING, JobState.RUNNABLE, JobState.STARTING)


@dataclass(slots=True)
class Stage:
    """Plan and counters of a stage.

    Run time is a whole number of microseconds, because a sum of floats depends on the order of its terms. Bundles that
    were added by write number `void_at` or an earlier write belong to a plan that a retry has replaced.
    """

    planned: int | None = None
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    run_us: int = 0
    first_start_s: float | None = None
    last_end_s: float | None = None
    plan_round: int = 0
    cut_seq: int = -1
    uncut: TaskSet = TaskSet()
    void_at: int = NEVER

    def count(self, c: Completion) -> None:
        self.succeeded += len(c.succeeded)
        self.failed += len(c.failed)
        self.cancelled += len(c.cancelled)
        self.retried += c.retried
        self.run_us += round(c.run_s * US)
        first, last = self.first_start_s, self.last_end_s
        self.first_start_s = c.started_s if first is None else min(first, c.started_s)
        self.last_end_s = c.ended_s if last is None else max(last, c.ended_s)

    def reopen(self, taken_back: Reopening) -> None:
        self.succeeded -= taken_back.succeeded
        self.failed -= taken_back.failed
        self.cancelled -= taken_back.cancelled

    def void(self, *, round: int, at: int) -> None:
        """Set the stage's plan to unknown, because a retry replaces the plan.

        The plan's round becomes `round`, so that a late cut of the old plan is ignored.
        """
        self.planned, self.plan_round, self.cut_seq = None, round, -1
        self.uncut, self.run_us, self.void_at = TaskSet(), 0, at

    def record(self, name: StageName) -> StageRecord:
        counts = StageCounts(
            name,
            self.planned,
            self.succeeded,
            self.failed,
            self.cancelled,
            self.retried,
            self.run_us / US,
            self.first_start_s,
            self.last_end_s,
        )
        return StageRecord(counts, self.plan_round, self.cut_seq, self.uncut)


class BundleRow(NamedTuple):
    """The stored row of a bundle, or the part of the row that a change writes.

    `planned` is the bundle as it was planned, and `completion` is its completion with the number `seq`. `at` is the
    number of the write that added the bundle, or None if the change does not add the bundle.
    """

    stage: StageName
    id: BundleId
    at: int | None = None
    planned: Bundle | None = None
    completion: Completion | None = None
    seq: int | None = None

    @property
    def key(self) -> Key:
        return self.stage, self.id

    def record(self, last_seq: int) -> BundleRecord:
        """Return the bundle's record as of the time when `last_seq` was the newest seq of the job."""
        if self.completion and self.seq is not None and self.seq <= last_seq:
            return BundleRecord(self.completion.bundle, self.completion, self.seq)
        assert self.planned is not None
        return BundleRecord(self.planned)


@dataclass(slots=True)
class Projection:
    """The row of a job and the rows of its stages.

    `at` is the number of the current write, and `last_seq` is the newest seq of a completion. A ledger that does not
    store `at` or `last_seq` leaves the default value.
    """

    job: JobDef
    state: JobState
    reason: str = ""
    control: Control = Control.RUN
    round: int = 0
    ended_s: float | None = None
    at: int = 0
    last_seq: int = -1
    stages: dict[StageName, Stage] = field(default_factory=dict)

    def copy(self) -> Projection:
        return replace(self, stages={name: replace(stage) for name, stage in self.stages.items()})

    def rows(self, stamp: str | int = "") -> JobRows:
        record = JobRecord(self.job, self.state, self.reason, self.control, self.round, self.ended_s)
        return JobRows(record, tuple(s.record(name) for name, s in self.stages.items()), stamp)

    def stage(self, name: StageName) -> Stage:
        """Return the stage `name`. Raise NotFound if the stage does not exist."""
        if name not in self.stages:
            raise NotFound(f"The ledger does not contain stage {name} of job {self.job.id}.")
        return self.stages[name]

    def is_void(self, row: BundleRow) -> bool:
        """Return whether the bundle belongs to a plan that a retry has replaced."""
        return row.at is not None and row.at <= self.stages[row.stage].void_at

    def to_json(self) -> dict[str, Json]:
        """Return all fields of the rows except the definition of the job, which never changes."""
        return {
            "state": self.state.value,
            "reason": self.reason,
            "control": self.control.value,
            "round": self.round,
            "ended_s": self.ended_s,
            "at": self.at,
            "last_seq": self.last_seq,
            "stages": [
                [name, {**asdict(s), "uncut": json_format.tasks_to_json(s.uncut)}] for name, s in self.stages.items()
            ],
        }

    @classmethod
    def from_json(cls, job: JobDef, doc: Mapping[str, Any]) -> Projection:
        fields = {**doc, "state": JobState(doc["state"]), "control": Control(doc["control"])}
        fields["stages"] = {
            StageName(name): Stage(**{**s, "uncut": json_format.tasks_from_json(s["uncut"])})
            for name, s in doc["stages"]
        }
        return cls(job, **fields)


# --- Changes of one job ---------------------------------------------------------------------------


def begin(change: AddJob) -> tuple[Projection, list[BundleRow]]:
    """Return a new job with the bundles of its first cut."""
    stages = {stage.name: Stage() for stage in change.job.stages}
    projection = Projection(change.job, change.state, stages=stages)
    if change.cut is None:
        return projection, []
    rows = add_cut(projection, change.cut, {})
    projection.state = JobState.RUNNABLE
    return projection, rows or []


def apply(projection: Projection, change: JobChange, known: Known) -> list[BundleRow] | None:
    """Apply the change to an existing job.

    Return the bundles that the change adds, or None if the change modifies nothing. `known` has the bundles of the
    change that the ledger already has.
    """
    if isinstance(change, AddCut):
        return add_cut(projection, change.cut, known)
    if isinstance(change, AddJob):
        return None
    if isinstance(change, MoveJob):
        is_new = move(projection, change)
    elif isinstance(change, SetControl):
        is_new = set_control(projection, change)
    elif isinstance(change, SetPlanned):
        is_new = set_planned(projection, change)
    elif isinstance(change, Reopen):
        is_new = reopen(projection, change)
    elif isinstance(change, Finish):
        is_new = finish(projection, change)
    else:
        assert_never(change)
    return [] if is_new else None


def move(projection: Projection, change: MoveJob) -> bool:
    if change.round != projection.round or not may_move(projection.state, change.state):
        return False
    projection.state, projection.reason = change.state, ""
    return True


def set_control(projection: Projection, change: SetControl) -> bool:
    if change.round != projection.round or projection.state.ended:
        return False
    if projection.control in (change.control, Control.CANCEL):
        return False
    projection.control = change.control
    return True


def set_planned(projection: Projection, change: SetPlanned) -> bool:
    stage = projection.stage(change.stage)
    if stage.planned is not None or change.round != projection.round:
        return False
    stage.planned = change.planned
    return True


def add_cut(projection: Projection, cut: Cut, known: Known) -> list[BundleRow] | None:
    stage = projection.stage(cut.stage)
    is_old = (cut.round, cut.seq) <= (stage.plan_round, stage.cut_seq)
    if is_old or cut.round != projection.round:
        return None
    for bundle in cut.bundles:
        projection.stage(bundle.stage)
    stage.plan_round, stage.cut_seq, stage.uncut = cut.round, cut.seq, cut.left
    if cut.planned is not None:
        stage.planned = cut.planned
    if projection.state in (JobState.SUBMITTED, JobState.PENDING):
        projection.state, projection.reason = JobState.RUNNABLE, ""
    return _plan(projection, cut.bundles, known)


def _plan(projection: Projection, bundles: Iterable[Bundle], known: Known) -> list[BundleRow]:
    rows: list[BundleRow] = []
    for bundle in bundles:
        if (bundle.stage, bundle.id) not in known:
            known[bundle.stage, bundle.id] = False
            rows.append(BundleRow(bundle.stage, bundle.id, projection.at, bundle))
    return rows


def reopen(projection: Projection, change: Reopen) -> bool:
    state = projection.state
    if change.round <= projection.round or not state.ended:
        return False
    if not may_move(state, JobState.PENDING):
        return False
    projection.round, projection.state, projection.reason = change.round, JobState.PENDING, ""
    projection.control, projection.ended_s = Control.RUN, None
    for taken_back in change.stages:
        stage = projection.stages.get(taken_back.stage)
        if stage is None:
            continue
        stage.reopen(taken_back)
        if taken_back.replan:
            stage.void(round=change.round, at=projection.at)
    return True


def finish(projection: Projection, change: Finish) -> bool:
    ending = change.ending
    if change.round != projection.round or projection.state.ended:
        return False
    # Replace NUL in the reason, because PostgreSQL's text type cannot store NUL, and the job could not end.
    projection.reason = ending.reason.replace("\0", "\N{REPLACEMENT CHARACTER}")
    projection.state, projection.ended_s = ending.state, ending.ended_s
    projection.control = Control.RUN
    for name, stage in projection.stages.items():
        closed = ending.closed.get(name, 0)
        stage.cancelled += closed
        if stage.planned is None:
            stage.planned = closed
    return True


# --- Folds of several jobs ------------------------------------------------------------------------


def positions_by_job(change: Fold) -> dict[JobId, list[int]]:
    """Return the positions of each job's completions in the fold."""
    positions: dict[JobId, list[int]] = {}
    for position, completion in enumerate(change.completions):
        positions.setdefault(completion.bundle.job, []).append(position)
    return positions


def check_stages(projections: Mapping[JobId, Projection], change: Fold) -> None:
    """Raise NotFound if a stage of the fold does not exist."""
    for c in change.completions:
        projection = projections[c.bundle.job]
        projection.stage(c.bundle.stage)
        for follow in c.follows:
            projection.stage(follow.bundle.stage)


def keys_of(change: Fold, positions: Iterable[int], *, with_follows: bool = True) -> list[Key]:
    """Return the keys of the bundles that a fold of the completions at `positions` writes, without duplicates."""
    keys: dict[Key, None] = {}
    for position in positions:
        c = change.completions[position]
        keys[c.bundle.stage, c.bundle.id] = None
        if with_follows:
            keys.update(((f.bundle.stage, f.bundle.id), None) for f in c.follows)
    return list(keys)


def fold(
    projection: Projection, change: Fold, positions: Sequence[int], known: Known, *, first_seq: int
) -> tuple[list[int], list[BundleRow] | None]:
    """Fold the completions of one job. The completion at position i of the fold gets the seq `first_seq` + i.

    Return the positions of the new completions, and the rows to write, or None if the fold changes nothing. `known` has
    the bundles of the fold that the ledger already has.
    """
    new: list[int] = []
    rows: list[BundleRow] = []
    for position in positions:
        c = change.completions[position]
        key = c.bundle.stage, c.bundle.id
        is_done = known.get(key)
        if is_done:
            continue
        known[key] = True
        new.append(position)
        seq = projection.last_seq = first_seq + position
        at = projection.at if is_done is None else None
        rows.append(BundleRow(*key, at, None, c, seq))
        projection.stage(c.bundle.stage).count(c)
        for stage, lost in change.casualties[position].items():
            if stage in projection.stages:
                projection.stages[stage].cancelled += lost
    # Add follow-ups after all completions, because the same fold may also complete a follow-up.
    follows = (f.bundle for position in new for f in change.completions[position].follows)
    rows += _plan(projection, follows, known)
    if projection.state in _WAITING:
        projection.state, projection.reason = JobState.RUNNING, ""
    elif not new:
        return new, None
    return new, rows


# --- Restoring a job ------------------------------------------------------------------------------


def restore(past: JobHistory, first_seq: int) -> tuple[Projection, list[BundleRow]]:
    """Build the rows of a job from its history in the bucket.

    Return the job and all of its bundles. The seqs of the completions begin at `first_seq`.
    """
    projection, _ = begin(AddJob(past.job, past.state))
    job = past.job.id
    rows: dict[Key, BundleRow] = {}
    known: Known = {}
    for number, past_round in enumerate(past.rounds):
        if number:
            reopen(projection, Reopen(job, number, past_round.reopened))
        projection.at += 1
        for cut in past_round.cuts:
            _merge(rows, add_cut(projection, cut, known) or [])
        for stage, planned in past_round.planned.items():
            set_planned(projection, SetPlanned(job, stage, planned, number))
        if past_round.completions:
            completions = Fold(past_round.completions, past_round.casualties)
            check_stages({job: projection}, completions)
            positions = range(len(past_round.completions))
            _, written = fold(projection, completions, positions, known, first_seq=first_seq)
            _merge(rows, written or [])
            first_seq += len(past_round.completions)
        if past_round.ending:
            finish(projection, Finish(job, past_round.ending, number))
    set_control(projection, SetControl(job, past.control, projection.round))
    if past.control is Control.PAUSE:
        move(projection, MoveJob(job, JobState.PAUSED, projection.round))
    return projection, list(rows.values())


def _merge(rows: dict[Key, BundleRow], written: Iterable[BundleRow]) -> None:
    for row in written:
        before = rows.get(row.key)
        if before:
            row = before._replace(completion=row.completion, seq=row.seq)
        rows[row.key] = row
