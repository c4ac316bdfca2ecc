"""The messages on the queues: a bundle for a worker, and what workers tell the manager.

Invariant: `read_x(x(m)) == m` for what its reader needs. A message is written in `wire`'s format;
one that is not is refused as a whole, so that nobody acts on half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from batchlab.model import Bundle, BundleId, Completion, JobId, Json, Outcome, StageName
from batchlab.protocol.checked import figure, known, text, whole
from batchlab.protocol.sealing import UNSEALED, CommitKey
from batchlab.protocol.wire import (
    VERSION,
    bundle_from_json,
    bundle_to_json,
    completion_from_json,
    completion_to_json,
    dumps,
    fields,
    loads,
    outcome_from_json,
    outcome_text,
)
from batchlab.tally import Asked, Requests


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """What a pool's queue carries.

    `items` are the encoded inputs where they are small enough to travel along, aligned with the
    bundle's tasks. `not_before_s` (epoch) is a wait longer than one DelaySeconds can be.
    `watchdog` marks a hand-over: the bundle still runs, and is run again only if it fell silent.
    `trace` is the W3C traceparent of whoever sent it, where the job is traced.
    `key` is the commit key of the job: a worker compares it with the job's definition.
    """

    bundle: Bundle
    items: Sequence[Json] | None = None
    not_before_s: float | None = None
    watchdog: bool = False
    trace: str = ""
    key: CommitKey = UNSEALED


def task_message(m: TaskMessage) -> str:
    doc: dict[str, Json] = {"v": VERSION, "b": bundle_to_json(m.bundle)}
    if m.items is not None:
        doc["in"] = m.items
    if m.not_before_s is not None:
        doc["nb"] = m.not_before_s
    if m.watchdog:
        doc["wd"] = True
    if m.trace:
        doc["tp"] = m.trace
    if m.key:
        doc["ck"] = m.key
    return dumps(doc)


def read_task_message(body: str) -> TaskMessage:
    doc = loads(body)
    return TaskMessage(
        bundle_from_json(doc["b"]),
        doc.get("in"),
        doc.get("nb"),
        doc.get("wd", False),
        doc.get("tp", ""),
        CommitKey(text(doc.get("ck", UNSEALED))),
    )


@dataclass(frozen=True, slots=True)
class Held:
    """A bundle in a worker's hands: the manager gives its message back when the instance dies.

    `receipt` is None for one that was handed over: its watchdog message is on the way.
    """

    queue: str
    receipt: str | None
    job: JobId
    stage: StageName
    bundle: BundleId
    running: bool


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's sign of life. `held` is complete as of `at_s`; `leaving` says it is draining."""

    worker: str
    instance: str
    pool: str
    at_s: float
    slots: int
    busy: int
    held: tuple[Held, ...]
    number: int
    """Counts the worker's beats: the queue may deliver an older one later, and clocks jump."""
    leaving: bool = False
    gone: bool = False
    """The last beat: it has given everything back."""
    key: str = field(default="", repr=False)
    """The key of its instance, a secret of its workers; "" for a worker of release 0.1.0."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """What a worker has met twice: a "message" of a bundle whose outcome was there, or an
    "execution" that another one was faster than, for so many slot seconds. `execution` is its own,
    so that hearing of it again counts nothing."""

    job: JobId
    stage: StageName
    kind: str
    execution: str
    slot_s: float


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker has done since its start, in numbers by name (see worker.deeds)."""

    worker: str
    counts: Mapping[str, int]


Traces = tuple[tuple[JobId, StageName, BundleId, str], ...]
"""Where the trace of each bundle goes on, as a W3C traceparent."""


@dataclass(frozen=True, slots=True)
class Events:
    """The body of one message on the events queue."""

    completions: tuple[Completion, ...] = ()
    committed: tuple[str, ...] = ()
    """Keys of outcomes whose completion is too large to travel; the reader fetches them."""
    beats: tuple[Beat, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    """Instead of completions, where they are small: whoever waits for results need not fetch them.
    """
    asked: tuple[Asked, ...] = ()
    """Goes along with beats."""
    duplicates: tuple[Duplicate, ...] = ()
    told: tuple[Told, ...] = ()
    """Likewise."""
    traces: Traces = ()
    """Of the outcomes in here that belong to a job that is traced."""


def events_message(e: Events) -> str:
    texts = {"v": dumps(VERSION)}
    if e.completions:
        texts["c"] = dumps([completion_to_json(c) for c in e.completions])
    if e.committed:
        texts["k"] = dumps(e.committed)
    if e.beats:
        texts["h"] = dumps([_beat_to_json(b) for b in e.beats])
    if e.outcomes:
        texts["o"] = f"[{','.join(map(outcome_text, e.outcomes))}]"
    if e.asked:
        texts["q"] = dumps(
            [[a.worker, a.instance, a.is_spot, *astuple(a.requests)] for a in e.asked]
        )
    if e.duplicates:
        texts["d"] = dumps([list(astuple(d)) for d in e.duplicates])
    if e.told:
        texts["m"] = dumps([[t.worker, t.counts] for t in e.told])
    if e.traces:
        texts["tp"] = dumps(e.traces)
    pairs = (f'"{key}":{text}' for key, text in texts.items())
    return f"{{{','.join(pairs)}}}"


def _beat_to_json(b: Beat) -> dict[str, Json]:
    doc = {**fields(b), "held": [fields(h) for h in b.held]}
    if not b.key:
        del doc["key"]
    return doc


def _beat_from_json(doc: Mapping[str, Any]) -> Beat:
    beat = Beat(**{**known(Beat, doc), "held": tuple(_held_from_json(h) for h in doc["held"])})
    for one in (beat.worker, beat.instance, beat.pool):
        text(one)
    for number in (beat.slots, beat.busy, beat.number):
        whole(number)
    figure(beat.at_s)
    return beat


def _held_from_json(doc: Mapping[str, Any]) -> Held:
    held = Held(**known(Held, doc))
    for one in (held.queue, held.job, held.stage, held.bundle, held.receipt or ""):
        text(one)
    return held


def _asked_from_json(doc: Sequence[Any]) -> Asked:
    worker, instance, is_spot, *counts = doc
    requests = Requests(*map(figure, counts[: len(Requests.__slots__)]))
    return Asked(text(worker), text(instance), requests, bool(is_spot))


def _duplicate_from_json(doc: Sequence[Any]) -> Duplicate:
    job, stage, kind, execution, slot_s, *_ = doc
    return Duplicate(
        JobId(text(job)), StageName(text(stage)), text(kind), text(execution), figure(slot_s)
    )


def read_events_message(body: str) -> Events:
    """What a worker tells; any error where it has another shape, and none afterwards."""
    doc = loads(body)
    return Events(
        tuple(completion_from_json(c) for c in doc.get("c", ())),
        tuple(text(key) for key in doc.get("k", ())),
        tuple(_beat_from_json(b) for b in doc.get("h", ())),
        tuple(outcome_from_json(o) for o in doc.get("o", ())),
        tuple(_asked_from_json(a) for a in doc.get("q", ())),
        tuple(_duplicate_from_json(d) for d in doc.get("d", ())),
        tuple(
            Told(str(worker), {str(name): int(count) for name, count in counts.items()})
            for worker, counts in doc.get("m", ())
        ),
        tuple(
            (JobId(str(job)), StageName(str(stage)), BundleId(str(bundle)), str(trace))
            for job, stage, bundle, trace in doc.get("tp", ())
        ),
    )
