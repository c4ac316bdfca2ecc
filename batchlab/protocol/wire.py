"""The JSON of everything that leaves a process: job, bundle, outcome, completion, messages.

Invariant: `x_from_json(x_to_json(x)) == x`. What a later batchlab has added is passed over, where
it has not said that one has to know it: by another `v`, or for a job by `needs`. That is refused,
never guessed at. Plain dicts by hand, since this is the hot path and the worker must not import
pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import isfinite
from typing import Any

from batchlab.errors import BackendError, TooNew
from batchlab.jobdef import InputDef, JobDef, NotifyDef, RetryRule, SplitBy, StageDef
from batchlab.model import (
    Bundle,
    BundleId,
    Completion,
    Control,
    Failure,
    FailureKind,
    Follow,
    JobId,
    JobState,
    Json,
    Outcome,
    StageName,
    TaskSet,
)
from batchlab.ports import Cut, Ending, Reopening
from batchlab.tally import Asked, Requests

VERSION = 1
PROTOCOL = 1
"""What a reader of jobs knows. A release whose workers have to do something that those before it do
not raises it, and writes it as `needs` into the jobs that ask for that, and only into those."""
FAILURE_KINDS = frozenset(kind.value for kind in FailureKind)
NO_TASKS = TaskSet()
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def dumps(value: Json) -> str:
    """Compact JSON; NaN and infinity are refused."""
    return _encode(value)  # json.dumps would make an encoder for each call


def to_bytes(value: Json) -> bytes:
    return dumps(value).encode()


def loads(data: bytes | str) -> dict[str, Any]:
    """A versioned document; TooNew where it is of a later version, BackendError where it is not one
    of ours at all."""
    try:
        doc = json.loads(data)
    except ValueError:
        doc = None
    version = doc.get("v") if isinstance(doc, dict) else None
    if isinstance(doc, dict) and version == VERSION:
        return doc
    if isinstance(version, int) and version > VERSION:
        raise TooNew(
            f"A stored object is in format {version}, and this batchlab knows {VERSION}.",
            remedy="It was written by a newer version.",
        )
    raise BackendError("A stored object is not in a format this batchlab knows.")


def fields(value: Any) -> dict[str, Json]:
    """The fields of a value that has slots, by name; asdict, which goes into them too, takes ten
    times as long."""
    return {name: getattr(value, name) for name in value.__slots__}


def _known(kind: Any, doc: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this batchlab knows; a later one may have added some."""
    return {name: doc[name] for name in kind.__slots__ if name in doc}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"a text belongs there, and not {type(value).__name__}")


def _figure(value: Any) -> float:
    if isinstance(value, int | float) and isfinite(value):
        return value
    raise ValueError(f"a finite number belongs there, and not {type(value).__name__}")


def _whole(value: Any) -> int:
    if isinstance(value, int):
        return value
    raise ValueError(f"a whole number belongs there, and not {type(value).__name__}")


def tasks_to_json(tasks: TaskSet) -> list[list[int]]:
    return [[start, stop] for start, stop in tasks.ranges]


def tasks_from_json(doc: Sequence[Sequence[int]]) -> TaskSet:
    return TaskSet(tuple([(int(start), int(stop)) for start, stop in doc])) if doc else NO_TASKS


def bundle_to_json(b: Bundle) -> dict[str, Json]:
    doc: dict[str, Json] = {"j": b.job, "s": b.stage, "t": tasks_to_json(b.tasks), "a": b.attempt}
    if b.round:
        doc["r"] = b.round
    if b.losses:
        doc["l"] = b.losses
    if b.source:
        doc["f"] = b.source
    return doc


def bundle_from_json(doc: dict[str, Any]) -> Bundle:
    source = doc.get("f")
    return Bundle(
        JobId(_text(doc["j"])),
        StageName(_text(doc["s"])),
        tasks_from_json(doc["t"]),
        _whole(doc["a"]),
        _whole(doc.get("r", 0)),
        _whole(doc.get("l", 0)),
        BundleId(_text(source)) if source else None,
    )


def _follow_to_json(f: Follow) -> dict[str, Json]:
    return {"b": bundle_to_json(f.bundle), "d": f.delay_s}


def _follow_from_json(doc: dict[str, Any]) -> Follow:
    return Follow(bundle_from_json(doc["b"]), _figure(doc["d"]))


def _failure_from_json(doc: dict[str, Any]) -> Failure:
    return Failure(**{**_known(Failure, doc), "kind": FailureKind(doc["kind"])})


def outcome_to_json(o: Outcome) -> dict[str, Json]:
    return {
        "v": VERSION,
        "bundle": bundle_to_json(o.bundle),
        "execution": o.execution,
        "worker": o.worker,
        "started_s": o.started_s,
        "ended_s": o.ended_s,
        "succeeded": tasks_to_json(o.succeeded),
        "values": o.values,
        "run_s": o.run_s,
        "failed": [fields(f) for f in o.failed],
        "cancelled": tasks_to_json(o.cancelled),
        "follows": [_follow_to_json(f) for f in o.follows],
        "log": o.log,
        "log_spans": o.log_spans,
    }


def outcome_from_json(doc: dict[str, Any]) -> Outcome:
    return Outcome(
        bundle_from_json(doc["bundle"]),
        _text(doc["execution"]),
        _text(doc["worker"]),
        _figure(doc["started_s"]),
        _figure(doc["ended_s"]),
        tasks_from_json(doc["succeeded"]),
        tuple(doc["values"]),
        tuple(doc["run_s"]),
        tuple(_failure_from_json(f) for f in doc["failed"]),
        tasks_from_json(doc["cancelled"]),
        tuple(_follow_from_json(f) for f in doc["follows"]),
        doc["log"],
        tuple((a, b, c) for a, b, c in doc["log_spans"]),
    )


def completion_to_json(c: Completion) -> dict[str, Json]:
    return {
        "b": bundle_to_json(c.bundle),
        "w": c.worker,
        "t0": c.started_s,
        "t1": c.ended_s,
        "ok": tasks_to_json(c.succeeded),
        "no": tasks_to_json(c.failed),
        "x": tasks_to_json(c.cancelled),
        "run": round(c.run_s, 6),
        "next": [_follow_to_json(f) for f in c.follows],
        "re": c.retried,
    }


def completion_from_json(doc: dict[str, Any]) -> Completion:
    return Completion(
        bundle_from_json(doc["b"]),
        _text(doc["w"]),
        _figure(doc["t0"]),
        _figure(doc["t1"]),
        tasks_from_json(doc["ok"]),
        tasks_from_json(doc["no"]),
        tasks_from_json(doc["x"]),
        _figure(doc["run"]),
        tuple(_follow_from_json(f) for f in doc["next"]),
        _whole(doc["re"]),
    )


def cut_to_json(c: Cut) -> dict[str, Json]:
    doc: dict[str, Json] = {
        "v": VERSION,
        "j": c.job,
        "s": c.stage,
        "round": c.round,
        "seq": c.seq,
        "bundles": [bundle_to_json(b) for b in c.bundles],
        "left": tasks_to_json(c.left),
        "planned": c.planned,
    }
    if c.at_s is not None:
        doc["at"] = c.at_s
    return doc


def cut_from_json(doc: dict[str, Any]) -> Cut:
    return Cut(
        JobId(doc["j"]),
        StageName(doc["s"]),
        doc["round"],
        doc["seq"],
        tuple(bundle_from_json(b) for b in doc["bundles"]),
        tasks_from_json(doc["left"]),
        doc["planned"],
        doc.get("at"),
    )


def reopening_to_json(r: Reopening) -> dict[str, Json]:
    return fields(r)


def reopening_from_json(doc: dict[str, Any]) -> Reopening:
    return Reopening(**_known(Reopening, doc))


def job_to_json(job: JobDef) -> dict[str, Json]:
    doc = {"v": VERSION, **fields(job)}
    doc["stages"] = [{**fields(stage), "retry": fields(stage.retry)} for stage in job.stages]
    doc["input"] = fields(job.input) if job.input else None
    # What an earlier batchlab does not know is left out where it says nothing.
    if job.max_cost_usd is None:
        del doc["max_cost_usd"]
    if not job.trace:
        del doc["trace"]
    if job.notify:
        doc["notify"] = [fields(one) for one in job.notify]
    else:
        del doc["notify"]
    return doc


def job_from_json(doc: dict[str, Any]) -> JobDef:
    """The job of a spec object, or of what `job_to_json` made; TooNew where it asks for what this
    batchlab does not know, or cannot be read."""
    if (needs := doc.get("needs", PROTOCOL)) != PROTOCOL:
        raise TooNew(
            f"The job needs protocol {needs}, and this batchlab knows {PROTOCOL}.",
            remedy="It was submitted to a newer version.",
        )
    try:
        return _job_from_json(doc)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TooNew(f"The job's definition cannot be read by this batchlab: {error!r}.") from error


def _job_from_json(doc: dict[str, Any]) -> JobDef:
    fields = _known(JobDef, doc)
    stages = tuple(_stage_from_json(s) for s in fields.pop("stages"))
    source = fields.pop("input")
    params = tuple((k, v) for k, v in fields.pop("params"))
    tags = tuple((k, v) for k, v in fields.pop("tags"))
    made = None
    if source is not None:
        split = SplitBy(source["split"])
        made = InputDef(tuple(source["keys"]), split, source["size"], source["header"])
    notify = tuple(
        NotifyDef(**{**_known(NotifyDef, one), "on": tuple(one["on"])})
        for one in fields.pop("notify", ())
    )
    return JobDef(**fields, stages=stages, input=made, params=params, tags=tags, notify=notify)


def _stage_from_json(doc: dict[str, Any]) -> StageDef:
    rule = doc["retry"]
    return StageDef(
        **{
            **_known(StageDef, doc),
            "after": tuple(doc["after"]),
            "command": tuple(doc["command"]),
            "retry": RetryRule(
                **{
                    **_known(RetryRule, rule),
                    "kinds": tuple(FailureKind(k) for k in rule["kinds"]),
                    "exit_codes": tuple(rule["exit_codes"]),
                    "exceptions": tuple(rule["exceptions"]),
                }
            ),
        }
    )


# --- Messages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """What a pool's queue carries.

    `items` are the encoded inputs where they are small enough to travel along, aligned with the
    bundle's tasks. `not_before_s` (epoch) is a wait longer than one DelaySeconds can be.
    `watchdog` marks a hand-over: the bundle still runs, and is run again only if it fell silent.
    `job` comes with the first bundles of a job, which saves their workers reading its spec; it has
    no cap, no targets and no trace.
    `trace` is the W3C traceparent of whoever sent it, where the job is traced.
    """

    bundle: Bundle
    items: Sequence[Json] | None = None
    not_before_s: float | None = None
    watchdog: bool = False
    job: JobDef | None = None
    trace: str = ""


def task_message(m: TaskMessage) -> str:
    doc: dict[str, Json] = {"v": VERSION, "b": bundle_to_json(m.bundle)}
    if m.items is not None:
        doc["in"] = m.items
    if m.not_before_s is not None:
        doc["nb"] = m.not_before_s
    if m.watchdog:
        doc["wd"] = True
    if m.job:
        # What only a manager needs to know stays in the bucket, addresses above all.
        doc["job"] = job_to_json(replace(m.job, max_cost_usd=None, notify=(), trace=""))
    if m.trace:
        doc["tp"] = m.trace
    return dumps(doc)


def read_task_message(body: str) -> TaskMessage:
    doc = loads(body)
    return TaskMessage(
        bundle_from_json(doc["b"]),
        doc.get("in"),
        doc.get("nb"),
        doc.get("wd", False),
        job_from_json(doc["job"]) if "job" in doc else None,
        doc.get("tp", ""),
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
    doc: dict[str, Json] = {"v": VERSION}
    if e.completions:
        doc["c"] = [completion_to_json(c) for c in e.completions]
    if e.committed:
        doc["k"] = e.committed
    if e.beats:
        doc["h"] = [_beat_to_json(b) for b in e.beats]
    if e.outcomes:
        doc["o"] = [outcome_to_json(o) for o in e.outcomes]
    if e.asked:
        doc["q"] = [[a.worker, a.instance, a.is_spot, *astuple(a.requests)] for a in e.asked]
    if e.duplicates:
        doc["d"] = [list(astuple(d)) for d in e.duplicates]
    if e.told:
        doc["m"] = [[t.worker, t.counts] for t in e.told]
    if e.traces:
        doc["tp"] = e.traces
    return dumps(doc)


def _beat_to_json(b: Beat) -> dict[str, Json]:
    return {**fields(b), "held": [fields(h) for h in b.held]}


def _beat_from_json(doc: Mapping[str, Any]) -> Beat:
    beat = Beat(**{**_known(Beat, doc), "held": tuple(_held_from_json(h) for h in doc["held"])})
    for text in (beat.worker, beat.instance, beat.pool):
        _text(text)
    for number in (beat.slots, beat.busy, beat.number):
        _whole(number)
    _figure(beat.at_s)
    return beat


def _held_from_json(doc: Mapping[str, Any]) -> Held:
    held = Held(**_known(Held, doc))
    for text in (held.queue, held.job, held.stage, held.bundle, held.receipt or ""):
        _text(text)
    return held


def _asked_from_json(doc: Sequence[Any]) -> Asked:
    worker, instance, is_spot, *counts = doc
    requests = Requests(*map(_figure, counts[: len(Requests.__slots__)]))
    return Asked(_text(worker), _text(instance), requests, bool(is_spot))


def _duplicate_from_json(doc: Sequence[Any]) -> Duplicate:
    job, stage, kind, execution, slot_s, *_ = doc
    return Duplicate(
        JobId(_text(job)), StageName(_text(stage)), _text(kind), _text(execution), _figure(slot_s)
    )


def read_events_message(body: str) -> Events:
    """What a worker tells; any error where it has another shape, and none afterwards."""
    doc = loads(body)
    return Events(
        tuple(completion_from_json(c) for c in doc.get("c", ())),
        tuple(_text(key) for key in doc.get("k", ())),
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


@dataclass(frozen=True, slots=True)
class Word:
    """The content of a control object. With CANCEL it says what the job ends as, and why, and which
    round of it: a bucket whose ETags are hashes must tell one cancellation from the next. `tail`
    grows each time somebody asks for what running tasks print, the last time at `tail_s` (epoch)
    (see worker.tails)."""

    control: Control
    state: JobState = JobState.CANCELLED
    reason: str = ""
    round: int = 0
    tail: int = 0
    tail_s: float | None = None


def word_to_bytes(word: Word) -> bytes:
    doc: dict[str, Any] = {"v": VERSION, "control": word.control.value}
    if word.control is Control.CANCEL:
        doc |= {"state": word.state.value, "reason": word.reason, "round": word.round}
    if word.tail:
        doc["tail"] = word.tail
        if word.tail_s is not None:
            doc["tail_s"] = word.tail_s
    return to_bytes(doc)


def word_from_bytes(data: bytes) -> Word:
    """BackendError where it cannot be read: whoever asks whether a task may start then knows of no
    word that allows it."""
    doc = loads(data)
    try:
        return Word(
            Control(doc["control"]),
            JobState(doc.get("state", "CANCELLED")),
            doc.get("reason", ""),
            doc.get("round", 0),
            doc.get("tail", 0),
            doc.get("tail_s"),
        )
    except (KeyError, ValueError) as error:
        raise TooNew(f"The word {doc.get('control')!r} is not known to this batchlab.") from error


def ending_to_json(e: Ending) -> dict[str, Json]:
    return {"v": VERSION, **fields(e)}


def ending_from_json(doc: dict[str, Any]) -> Ending:
    return Ending(JobState(doc["state"]), doc["reason"], doc["ended_s"], doc["closed"])
