"""A job and its stages as one value, and what each call of the port makes of it.

Invariant: what SqlLedger's statements do to rows, these do to a Book, for the ledgers that have no
SQL; the contract suite and a comparison of random lives hold them against it. Nothing here does
input or output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from batchlab.core.errors import NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import (
    Bundle,
    BundleId,
    Completion,
    Control,
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
    Ending,
    Finish,
    JobChange,
    JobRecord,
    JobRows,
    MoveJob,
    Past,
    Reopen,
    Reopening,
    SetControl,
    StageRecord,
)
from batchlab.core.protocol import json_format

US = 1_000_000
Key = tuple[StageName, BundleId]
Known = dict[Key, bool]
"""The bundles that are there, and whether each is done."""

_WAITING = (JobState.SUBMITTED, JobState.PENDING, JobState.RUNNABLE, JobState.STARTING)


@dataclass(slots=True)
class Stage:
    """A stage's counters. Run time is in microseconds: a sum of floats would depend on the order.

    Rows that came at `void_at` or before are of a plan that a retry has made anew.
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
    void_at: int = -1

    def add(self, c: Completion) -> None:
        """Count it."""
        self.succeeded += len(c.succeeded)
        self.failed += len(c.failed)
        self.cancelled += len(c.cancelled)
        self.retried += c.retried
        self.run_us += round(c.run_s * US)
        first, last = self.first_start_s, self.last_end_s
        self.first_start_s = c.started_s if first is None else min(first, c.started_s)
        self.last_end_s = c.ended_s if last is None else max(last, c.ended_s)

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


@dataclass(frozen=True, slots=True)
class Row:
    """A bundle, or what a write adds to one: `planned` as it was cut, `completion` with its `seq`.

    `at` is the book's count when it came, None where it was there before.
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
        """As it was when `last_seq` was the newest."""
        if self.completion and self.seq is not None and self.seq <= last_seq:
            return BundleRecord(self.completion.bundle, self.completion, self.seq)
        assert self.planned is not None
        return BundleRecord(self.planned)


@dataclass(slots=True)
class Book:
    """`at` counts the writes, `last_seq` is the newest completion's."""

    job: JobDef
    state: JobState
    reason: str = ""
    control: Control = Control.RUN
    round: int = 0
    ended_s: float | None = None
    at: int = 0
    last_seq: int = -1
    stages: dict[StageName, Stage] = field(default_factory=dict)

    def rows(self, stamp: str | int = "") -> JobRows:
        record = JobRecord(
            self.job, self.state, self.reason, self.control, self.round, self.ended_s
        )
        return JobRows(record, tuple(s.record(name) for name, s in self.stages.items()), stamp)

    def stage(self, name: StageName) -> Stage:
        """NotFound where the job has none of that name."""
        if name not in self.stages:
            raise NotFound(f"The ledger has no stage {name} of a job {self.job.id}.")
        return self.stages[name]

    def is_void(self, row: Row) -> bool:
        return row.at is not None and row.at <= self.stages[row.stage].void_at

    def to_json(self) -> dict[str, Json]:
        """All but the job's definition, which never changes."""
        return {
            "state": self.state.value,
            "reason": self.reason,
            "control": self.control.value,
            "round": self.round,
            "ended_s": self.ended_s,
            "at": self.at,
            "last_seq": self.last_seq,
            "stages": [
                [name, {**asdict(s), "uncut": json_format.tasks_to_json(s.uncut)}]
                for name, s in self.stages.items()
            ],
        }

    @classmethod
    def from_json(cls, job: JobDef, doc: Mapping[str, Any]) -> Book:
        fields = {**doc, "state": JobState(doc["state"]), "control": Control(doc["control"])}
        fields["stages"] = {
            StageName(name): Stage(**{**s, "uncut": json_format.tasks_from_json(s["uncut"])})
            for name, s in doc["stages"]
        }
        return cls(job, **fields)


# --- What may happen to it ------------------------------------------------------------------------


def begin(job: JobDef, state: JobState, cut: Cut | None = None) -> tuple[Book, list[Row]]:
    """A job that has just come, with its first cut where that is known."""
    book = Book(job, state, stages={stage.name: Stage() for stage in job.stages})
    if cut is None:
        return book, []
    rows = take_cut(book, cut, {})
    book.state = JobState.RUNNABLE
    return book, rows or []


def apply(book: Book, change: JobChange, known: Known) -> list[Row] | None:
    """Apply the change to a job that exists. Return the bundles that it adds, or None if it has no
    effect."""
    if isinstance(change, AddCut):
        return take_cut(book, change.cut, known)
    if isinstance(change, AddJob):
        return None
    if isinstance(change, MoveJob):
        is_new = move(book, change.state, change.round)
    elif isinstance(change, SetControl):
        is_new = set_control(book, change.control, change.round)
    elif isinstance(change, Reopen):
        is_new = reopen(book, change.round, change.stages)
    elif isinstance(change, Finish):
        is_new = finish(book, change.round, change.ending)
    else:
        is_new = set_planned(book, change.stage, change.planned, change.round)
    return [] if is_new else None


def move(book: Book, state: JobState, round: int) -> bool:
    if round != book.round or not may_move(book.state, state):
        return False
    book.state, book.reason = state, ""
    return True


def set_control(book: Book, control: Control, round: int) -> bool:
    if round != book.round or book.state.ended or book.control in (control, Control.CANCEL):
        return False
    book.control = control
    return True


def set_planned(book: Book, stage: StageName, planned: int, round: int) -> bool:
    if book.stage(stage).planned is not None or round != book.round:
        return False
    book.stage(stage).planned = planned
    return True


def take_cut(book: Book, cut: Cut, known: Known) -> list[Row] | None:
    """The bundles it plans; None for a cut that is known, old, or of another round than the job.
    `known` then has them too."""
    stage = book.stage(cut.stage)
    is_old = (cut.round, cut.seq) <= (stage.plan_round, stage.cut_seq)
    if is_old or cut.round != book.round:
        return None
    stage.plan_round, stage.cut_seq, stage.uncut = cut.round, cut.seq, cut.left
    if cut.planned is not None:
        stage.planned = cut.planned
    if book.state in (JobState.SUBMITTED, JobState.PENDING):
        book.state, book.reason = JobState.RUNNABLE, ""
    return _plan(book, cut.bundles, known)


def _plan(book: Book, bundles: Iterable[Bundle], known: Known) -> list[Row]:
    rows: list[Row] = []
    for bundle in bundles:
        if (bundle.stage, bundle.id) not in known:
            book.stage(bundle.stage)
            known[bundle.stage, bundle.id] = False
            rows.append(Row(bundle.stage, bundle.id, book.at, bundle))
    return rows


def touched(completions: Iterable[Completion]) -> list[Key]:
    """The bundles that folding these is about."""
    keys: dict[Key, None] = {}
    for c in completions:
        keys[c.bundle.stage, c.bundle.id] = None
        keys.update(((f.bundle.stage, f.bundle.id), None) for f in c.follows)
    return list(keys)


def fold(
    book: Book,
    completions: Sequence[tuple[int, Completion, Mapping[StageName, int]]],
    known: Known,
) -> tuple[list[bool], list[Row]]:
    """Fold (seq, completion, casualties) of this job; which were new, and the rows they write."""
    done = [_complete(book, seq, c, known) for seq, c, _ in completions]
    for row, (_, c, casualties) in zip(done, completions, strict=True):
        if row is None:
            continue
        book.stage(c.bundle.stage).add(c)
        for stage, lost in casualties.items():
            if stage in book.stages:
                book.stages[stage].cancelled += lost
    # After the completions: one of them may be a follow's.
    new = [row is not None for row in done]
    follows = (
        f.bundle
        for is_new, (_, c, _) in zip(new, completions, strict=True)
        if is_new
        for f in c.follows
    )
    rows = [row for row in done if row] + _plan(book, follows, known)
    if completions and book.state in _WAITING:
        book.state, book.reason = JobState.RUNNING, ""
    return new, rows


def _complete(book: Book, seq: int, c: Completion, known: Known) -> Row | None:
    key = (c.bundle.stage, c.bundle.id)
    is_done = known.get(key)
    if is_done:
        return None
    known[key] = True
    book.last_seq = seq
    return Row(*key, book.at if is_done is None else None, None, c, seq)


def reopen(book: Book, round: int, reopened: Sequence[Reopening]) -> bool:
    if round <= book.round or not book.state.ended or not may_move(book.state, JobState.PENDING):
        return False
    book.round, book.state, book.reason = round, JobState.PENDING, ""
    book.control, book.ended_s = Control.RUN, None
    for one in reopened:
        stage = book.stages.get(one.stage)
        if stage is None:
            continue
        stage.succeeded -= one.succeeded
        stage.failed -= one.failed
        stage.cancelled -= one.cancelled
        if one.replan:
            # The round too, or a cut of the void plan that comes once more would pass as new.
            stage.planned, stage.plan_round, stage.cut_seq = None, round, -1
            stage.uncut, stage.run_us, stage.void_at = TaskSet(), 0, book.at
    return True


def finish(book: Book, round: int, end: Ending) -> bool:
    if round != book.round or book.state.ended:
        return False
    book.state, book.reason, book.ended_s = end.state, end.reason, end.ended_s
    book.control = Control.RUN
    for name, stage in book.stages.items():
        closed = end.closed.get(name, 0)
        stage.cancelled += closed
        if stage.planned is None:
            stage.planned = closed
    return True


def relive(past: Past, first_seq: int) -> tuple[Book, list[Row]]:
    """The job as what the bucket says of it makes it, completions with the seqs from `first_seq`
    on; and all its rows."""
    book, _ = begin(past.job, past.state)
    rows: dict[Key, Row] = {}
    known: Known = {}
    seq = first_seq
    for number, one in enumerate(past.rounds):
        if number:
            reopen(book, number, one.reopened)
        book.at += 1
        for cut in one.cuts:
            _keep(rows, take_cut(book, cut, known) or [])
        for stage, planned in one.planned.items():
            set_planned(book, stage, planned, number)
        numbered = [
            (seq + i, c, lost)
            for i, (c, lost) in enumerate(zip(one.completions, one.casualties, strict=True))
        ]
        seq += len(numbered)
        _keep(rows, fold(book, numbered, known)[1])
        if one.ending:
            finish(book, number, one.ending)
    set_control(book, past.control, book.round)
    if past.control is Control.PAUSE:
        move(book, JobState.PAUSED, book.round)
    return book, list(rows.values())


def _keep(rows: dict[Key, Row], more: Iterable[Row]) -> None:
    for row in more:
        before = rows.get(row.key)
        if before:
            row = Row(*row.key, before.at, before.planned, row.completion, row.seq)
        rows[row.key] = row
