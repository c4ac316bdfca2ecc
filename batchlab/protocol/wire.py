"""The JSON of what leaves a process: job, cut, bundle, outcome, completion, word, end.

Invariant: `x_from_json(x_to_json(x)) == x`. What a later batchlab has added is passed over, where
it has not said that one has to know it: by another `v`, or for a job by `needs`. That is refused,
never guessed at. Plain dicts by hand, since this is the hot path and the worker must not import
pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from batchlab.protocol.checked import figure, known, text, whole

VERSION = 1
PROTOCOL = 2
"""What a reader of jobs knows. A release whose workers have to do something that those before it do
not raises it, and writes it as `needs` into the jobs that ask for that, and only into those."""
SEALED = 2
"""The protocol since which jobs have commit keys."""
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
    if b.due_s is not None:
        doc["w"] = b.due_s
    return doc


def bundle_from_json(doc: dict[str, Any]) -> Bundle:
    source = doc.get("f")
    return Bundle(
        JobId(text(doc["j"])),
        StageName(text(doc["s"])),
        tasks_from_json(doc["t"]),
        whole(doc["a"]),
        whole(doc.get("r", 0)),
        whole(doc.get("l", 0)),
        BundleId(text(source)) if source else None,
        figure(doc["w"]) if "w" in doc else None,
    )


def _follow_to_json(f: Follow) -> dict[str, Json]:
    return {"b": bundle_to_json(f.bundle), "d": f.delay_s}


def _follow_from_json(doc: dict[str, Any]) -> Follow:
    return Follow(bundle_from_json(doc["b"]), figure(doc["d"]))


def _failure_from_json(doc: dict[str, Any]) -> Failure:
    return Failure(**{**known(Failure, doc), "kind": FailureKind(doc["kind"])})


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


def outcome_text(o: Outcome) -> str:
    """Its JSON; made once."""
    try:
        return o._text
    except AttributeError:
        text = dumps(outcome_to_json(o))
        object.__setattr__(o, "_text", text)
        return text


def outcome_from_json(doc: dict[str, Any]) -> Outcome:
    return Outcome(
        bundle_from_json(doc["bundle"]),
        text(doc["execution"]),
        text(doc["worker"]),
        figure(doc["started_s"]),
        figure(doc["ended_s"]),
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
        text(doc["w"]),
        figure(doc["t0"]),
        figure(doc["t1"]),
        tasks_from_json(doc["ok"]),
        tasks_from_json(doc["no"]),
        tasks_from_json(doc["x"]),
        figure(doc["run"]),
        tuple(_follow_from_json(f) for f in doc["next"]),
        whole(doc["re"]),
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
    return Reopening(**known(Reopening, doc))


def job_to_json(job: JobDef) -> dict[str, Json]:
    doc = {"v": VERSION, **fields(job)}
    doc["stages"] = [{**fields(stage), "retry": fields(stage.retry)} for stage in job.stages]
    doc["input"] = fields(job.input) if job.input else None
    # What an earlier batchlab does not know is left out where it says nothing.
    if job.max_cost_usd is None:
        del doc["max_cost_usd"]
    if not job.trace:
        del doc["trace"]
    if job.commit_hash:
        doc["needs"] = SEALED
    else:
        del doc["commit_hash"]
    if job.notify:
        doc["notify"] = [fields(one) for one in job.notify]
    else:
        del doc["notify"]
    return doc


def job_from_json(doc: dict[str, Any]) -> JobDef:
    """The job of a spec object, or of what `job_to_json` made; TooNew where it asks for what this
    batchlab does not know, or cannot be read."""
    needs = doc.get("needs", 1)
    if not isinstance(needs, int) or not 1 <= needs <= PROTOCOL:
        raise TooNew(
            f"The job needs protocol {needs}, and this batchlab knows {PROTOCOL}.",
            remedy="It was submitted to a newer version.",
        )
    try:
        return _job_from_json(doc)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TooNew(f"The job's definition cannot be read by this batchlab: {error!r}.") from error


def _job_from_json(doc: dict[str, Any]) -> JobDef:
    fields = known(JobDef, doc)
    stages = tuple(_stage_from_json(s) for s in fields.pop("stages"))
    source = fields.pop("input")
    params = tuple((k, v) for k, v in fields.pop("params"))
    tags = tuple((k, v) for k, v in fields.pop("tags"))
    made = None
    if source is not None:
        split = SplitBy(source["split"])
        made = InputDef(tuple(source["keys"]), split, source["size"], source["header"])
    notify = tuple(
        NotifyDef(**{**known(NotifyDef, one), "on": tuple(one["on"])})
        for one in fields.pop("notify", ())
    )
    return JobDef(**fields, stages=stages, input=made, params=params, tags=tags, notify=notify)


def _stage_from_json(doc: dict[str, Any]) -> StageDef:
    rule = doc["retry"]
    return StageDef(
        **{
            **known(StageDef, doc),
            "after": tuple(doc["after"]),
            "command": tuple(doc["command"]),
            "retry": RetryRule(
                **{
                    **known(RetryRule, rule),
                    "kinds": tuple(FailureKind(k) for k in rule["kinds"]),
                    "exit_codes": tuple(rule["exit_codes"]),
                    "exceptions": tuple(rule["exceptions"]),
                }
            ),
        }
    )


@dataclass(frozen=True, slots=True)
class Word:
    """The content of a control object. With CANCEL it says what the job ends as, and why. `round`
    is the job's round that it is for: a word of one round never stands in the place of a later
    one's, and a bucket whose ETags are hashes tells the words of two rounds apart. `tail`
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
    elif word.round:
        doc["round"] = word.round
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
