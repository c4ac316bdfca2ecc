"""The JSON of what leaves a process: job, cut, bundle, outcome, completion, word, end.

Invariant: `x_from_json(x_to_json(x)) == x`. What a later batchlab has added is passed over, where
it has not said that one has to know it: by another `v`, or for a job by `needs`. That is refused,
never guessed at. Plain dicts by hand, since this is the hot path and the worker must not import
pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from batchlab.core.errors import BatchlabError, Malformed, TooNew
from batchlab.core.job_definition import InputDef, JobDef, NotifyDef, RetryRule, SplitBy, StageDef
from batchlab.core.model import (
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
from batchlab.core.ports import Cut, Ending, Reopening
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.field_checks import (
    MOST_COUNT,
    MOST_IN_BUNDLE,
    MOST_ROUNDS,
    MOST_TASKS,
    UNREADABLE,
    figure,
    figures,
    fitted,
    flag,
    handler,
    integer,
    known,
    label,
    listed,
    name,
    new_label,
    shallow,
    text,
    whole,
)
from batchlab.core.protocol.values import BRACKET_WEIGHT, OUTCOME_WEIGHT, weight

T = TypeVar("T")
Known = tuple[Any, TaskSet]
"""A document of tasks, and what was read from it."""

VERSION = 1
PROTOCOL = 2
"""What a reader of jobs knows. A release whose workers have to do something that those before it do
not raises it, and writes it as `needs` into the jobs that ask for that, and only into those."""
SEALED = 2
"""The protocol since which jobs have commit keys."""
FAILURE_KINDS = frozenset(kind.value for kind in FailureKind)
WORDS = frozenset(word.value for word in Control)
NO_TASKS = TaskSet()
# Values are checked for cycles where they are encoded.
_encode = json.JSONEncoder(
    separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
).encode


def dumps(value: Json) -> str:
    """Compact JSON; NaN and infinity are refused."""
    return _encode(value)  # json.dumps would make an encoder for each call


def to_bytes(value: Json) -> bytes:
    return dumps(value).encode()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def is_too_heavy(data: bytes | str) -> bool:
    """Whether a JSON text weighs more than an outcome may."""
    # Counting brackets takes time, and most texts are too short to need it.
    if len(data) * (1 + BRACKET_WEIGHT) <= OUTCOME_WEIGHT:
        return False
    return weight(data if isinstance(data, str) else data.decode("latin-1")) > OUTCOME_WEIGHT


def loads(data: bytes | str) -> dict[str, Any]:
    """Return a versioned document; TooNew if a later version has written it, Malformed if it is not
    a document of batchlab."""
    try:
        text = data if isinstance(data, str) else data.decode()
        doc = _decode(text)
        if "\\u" in text and ("\\ud" in text or "\\uD" in text):
            # An escaped half of a surrogate pair is JSON, but no text that could be stored or sent.
            dumps(doc).encode()
    except UNREADABLE as error:
        raise Malformed(f"This is not a JSON text that batchlab reads: {brief(error)}.") from error
    version = doc.get("v") if isinstance(doc, dict) else None
    if isinstance(doc, dict) and type(version) is int:
        if version == VERSION:
            return doc
        if version > VERSION:
            raise TooNew(
                f"A stored object is in format {version:.6g}, and this batchlab knows {VERSION}.",
                remedy="It was written by a newer version.",
            )
    raise Malformed("A stored object is not in a format this batchlab knows.")


def brief(error: Exception) -> str:
    """Return what is wrong in at most 200 characters, without text that a worker has chosen."""
    if isinstance(error, BatchlabError):
        return error.message.rstrip(".")[:200]
    if isinstance(error, KeyError):
        return "a field is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    told = str(error) if type(error) is ValueError else type(error).__name__
    return told[:200]


def fields(value: Any) -> dict[str, Json]:
    """The fields of a value that has slots, by name; asdict, which goes into them too, takes ten
    times as long."""
    return {name: getattr(value, name) for name in value.__slots__}


def tasks_to_json(tasks: TaskSet) -> list[list[int]]:
    return [[start, stop] for start, stop in tasks.ranges]


def tasks_from_json(doc: Sequence[Sequence[int]], known: Known | None = None) -> TaskSet:
    """Return the tasks in a document, which are most of the time those of its bundle (`known`)."""
    if known and doc == known[0]:
        return known[1]
    if not listed(doc):
        return NO_TASKS
    ranges: list[tuple[int, int]] = []
    for start, stop in doc:
        if type(start) is not int or type(stop) is not int or stop > MOST_TASKS:
            raise ValueError("a range of tasks is expected")
        ranges.append((start, stop))
    return TaskSet(tuple(ranges))


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


def bundle_from_json(doc: dict[str, Any], known: Known | None = None) -> Bundle:
    source = doc.get("f")
    tasks = tasks_from_json(doc["t"], known)
    if not 0 < len(tasks) <= MOST_IN_BUNDLE:
        raise ValueError(f"a bundle of 1 to {MOST_IN_BUNDLE} tasks is expected")
    return Bundle(
        JobId(name(doc["j"])),
        StageName(name(doc["s"])),
        tasks,
        whole(doc["a"]),
        whole(doc["r"], MOST_ROUNDS) if "r" in doc else 0,
        whole(doc["l"]) if "l" in doc else 0,
        BundleId(new_label(source)) if source else None,
        figure(doc["w"]) if "w" in doc else None,
    )


def _follow_to_json(f: Follow) -> dict[str, Json]:
    return {"b": bundle_to_json(f.bundle), "d": f.delay_s}


def _follow_from_json(doc: dict[str, Any], known: Known | None = None) -> Follow:
    return Follow(bundle_from_json(doc["b"], known), figure(doc["d"]))


def _follows_from_json(docs: Any, known: Known) -> tuple[Follow, ...]:
    return tuple([_follow_from_json(doc, known) for doc in listed(docs)]) if docs != [] else ()


def _each(read: Callable[[Any], T], docs: Any) -> tuple[T, ...]:
    """Return what `read` makes of each document in a list, which is empty most of the time."""
    return tuple([read(doc) for doc in listed(docs)]) if docs != [] else ()


def _failure_from_json(doc: dict[str, Any]) -> Failure:
    code = doc.get("exit_code")
    return Failure(
        whole(doc["task"], MOST_TASKS),
        FailureKind(doc["kind"]),
        text(doc["reason"]),
        text(doc.get("error", "")),
        text(doc.get("traceback", "")),
        None if code is None else integer(code),
        figure(doc.get("run_s", 0.0)),
        flag(doc.get("final", True)),
    )


def _span_from_json(doc: Sequence[Any]) -> tuple[int, int, int]:
    task, start, stop = doc
    if whole(start) > whole(stop):
        raise ValueError("a span of a log ends before it begins")
    return whole(task, MOST_TASKS), start, stop


def check_parts(
    bundle: Bundle,
    succeeded: TaskSet,
    failed: TaskSet,
    cancelled: TaskSet,
    follows: Sequence[Follow],
) -> None:
    """Raise ValueError unless every task of the bundle went exactly one way: it succeeded, failed
    for good, was cancelled, or goes on in one follow of the same stage (see `settle`)."""
    if succeeded.ranges == bundle.tasks.ranges and not (
        follows or failed.ranges or cancelled.ranges
    ):
        return
    parts = [succeeded]
    if failed.ranges:
        parts.append(failed)
    if cancelled.ranges:
        parts.append(cancelled)
    for follow in follows:
        one = follow.bundle
        if one.job != bundle.job or one.round != bundle.round:
            raise ValueError("a follow is a bundle of another job or round")
        if one.stage != bundle.stage:
            inside = one.tasks.ranges == succeeded.ranges or not one.tasks - succeeded
            if one.source != bundle.id or not inside:
                raise ValueError("a follow in another stage is not fed by this bundle")
            continue
        again = one.attempt == bundle.attempt + 1
        if not again and (one.attempt != bundle.attempt or one.tasks == bundle.tasks):
            raise ValueError("a follow in the same stage has a wrong attempt")
        if one.source != bundle.source:
            raise ValueError("a follow in the same stage has another source")
        parts.append(one.tasks)
    if len(parts) == 1 and succeeded.ranges == bundle.tasks.ranges:
        return
    if sum(map(len, parts)) != len(bundle.tasks) or TaskSet.union(parts) != bundle.tasks:
        raise ValueError("the tasks of its parts are not those of the bundle")


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


def fitting(outcome: Outcome) -> Outcome:
    """Return the outcome, without its tracebacks if it would be too heavy with them. Its values fit
    in any case (see `worker.bench`)."""
    if not is_too_heavy(outcome_text(outcome)):
        return outcome
    return replace(outcome, failed=tuple([replace(one, traceback="") for one in outcome.failed]))


def outcome_from_json(doc: dict[str, Any]) -> Outcome:
    """Return the outcome in a document; one of UNREADABLE if it is not one."""
    bundle = bundle_from_json(doc["bundle"])
    known = doc["bundle"]["t"], bundle.tasks
    succeeded = tasks_from_json(doc["succeeded"], known)
    cancelled = tasks_from_json(doc["cancelled"])
    values, run_s = listed(doc["values"]), figures(doc["run_s"])
    if not len(values) == len(run_s) == len(succeeded):
        raise ValueError("there is not one value and one run time for each task that succeeded")
    shallow(values)
    failed = _each(_failure_from_json, doc["failed"])
    final = TaskSet.of([f.task for f in failed if f.final]) if failed else NO_TASKS
    follows = _follows_from_json(doc["follows"], known)
    check_parts(bundle, succeeded, final, cancelled, follows)
    if failed:
        tasks = {f.task for f in failed}
        if len(tasks) != len(failed) or TaskSet.of(tasks) - bundle.tasks:
            raise ValueError("failures are not of one task of the bundle each")
    log = text(doc["log"])
    if log and not log.startswith(object_keys.logs(bundle.job)):
        raise ValueError("the log is not a log of its job")
    return Outcome(
        bundle,
        new_label(doc["execution"]),
        label(doc["worker"]),
        figure(doc["started_s"]),
        figure(doc["ended_s"]),
        succeeded,
        tuple(values),
        run_s,
        failed,
        cancelled,
        follows,
        log,
        _each(_span_from_json, doc["log_spans"]),
    )


def outcome_from_bytes(data: bytes, key: str) -> Outcome:
    """Return the outcome in the object `key`, which is an outcome's or a replacement's. Malformed,
    naming the key, if it cannot be read or is the outcome of another bundle.

    A later format is unreadable too: outcomes of a job whose definition can be read have the format
    of this release (see PROTOCOL), so a worker cannot hold up a job by naming another one.
    """
    try:
        if is_too_heavy(data):
            raise ValueError(f"it is larger than an outcome may be ({len(data)} bytes)")
        outcome = outcome_from_json(loads(data))
        if not object_keys.is_outcome_of(key, outcome.bundle):
            raise ValueError("it is the outcome of another bundle")
    except (Malformed, TooNew, *UNREADABLE) as error:
        raise unreadable(key, error) from error
    return outcome


def unreadable(key: str, error: Exception) -> Malformed:
    """Return the error that says which object cannot be read."""
    return Malformed(f"The object {key} cannot be read: {brief(error)}.")


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
    """Return the completion in a document; one of UNREADABLE if it is not one. Whether its parts
    agree is checked where it comes from a worker (see `check_parts`)."""
    bundle = bundle_from_json(doc["b"])
    known = doc["b"]["t"], bundle.tasks
    return Completion(
        bundle,
        label(doc["w"]),
        figure(doc["t0"]),
        figure(doc["t1"]),
        tasks_from_json(doc["ok"], known),
        tasks_from_json(doc["no"]),
        tasks_from_json(doc["x"]),
        figure(doc["run"]),
        _follows_from_json(doc["next"], known),
        whole(doc["re"], MOST_IN_BUNDLE),
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
    """Return the cut in a document; Malformed if it is not one, or has a bundle of another job,
    stage or round."""
    try:
        at_s, planned = doc.get("at"), doc["planned"]
        cut = Cut(
            JobId(name(doc["j"])),
            StageName(name(doc["s"])),
            whole(doc["round"]),
            whole(doc["seq"]),
            tuple([bundle_from_json(b) for b in listed(doc["bundles"])]),
            tasks_from_json(doc["left"]),
            None if planned is None else whole(planned, MOST_TASKS),
            None if at_s is None else figure(at_s),
        )
        mine = (cut.job, cut.stage, cut.round)
        if any((one.job, one.stage, one.round) != mine for one in cut.bundles):
            raise ValueError("it has a bundle of another job, stage or round")
        return cut
    except UNREADABLE as error:
        raise Malformed(f"A cut cannot be read: {brief(error)}.") from error


def reopening_to_json(r: Reopening) -> dict[str, Json]:
    return fields(r)


def reopening_from_json(doc: dict[str, Any]) -> Reopening:
    """Return the reopening in a document; one of UNREADABLE if it is not one."""
    return Reopening(
        StageName(name(doc["stage"])),
        whole(doc.get("succeeded", 0)),
        whole(doc.get("failed", 0)),
        whole(doc.get("cancelled", 0)),
        flag(doc.get("replan", False)),
    )


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
    except UNREADABLE as error:
        why = brief(error)
        raise TooNew(f"The job's definition cannot be read by this batchlab: {why}.") from error


def _job_from_json(doc: dict[str, Any]) -> JobDef:
    fields = known(JobDef, doc)
    stages = tuple(_stage_from_json(s) for s in fields.pop("stages"))
    source = fields.pop("input")
    params = tuple((k, v) for k, v in fields.pop("params"))
    tags = tuple((k, v) for k, v in fields.pop("tags"))
    made = None
    if source is not None:
        split = SplitBy(source["split"])
        made = fitted(InputDef(tuple(source["keys"]), split, source["size"], source["header"]))
    notify = tuple(
        fitted(NotifyDef(**{**known(NotifyDef, one), "on": tuple(one["on"])}))
        for one in fields.pop("notify", ())
    )
    name(fields["id"])
    return fitted(
        JobDef(**fields, stages=stages, input=made, params=params, tags=tags, notify=notify)
    )


def _stage_from_json(doc: dict[str, Any]) -> StageDef:
    rule = doc["retry"]
    if doc["handler"] is not None:
        handler(doc["handler"])
    name(doc["name"])
    retry = RetryRule(
        **{
            **known(RetryRule, rule),
            "kinds": tuple(FailureKind(k) for k in rule["kinds"]),
            "exit_codes": tuple(rule["exit_codes"]),
            "exceptions": tuple(rule["exceptions"]),
        }
    )
    return fitted(
        StageDef(
            **{
                **known(StageDef, doc),
                "after": tuple(doc["after"]),
                "command": tuple(doc["command"]),
                "retry": fitted(retry),
            }
        )
    )


@dataclass(frozen=True, slots=True)
class Word:
    """The content of a control object. With CANCEL it says what the job ends as, and why. `round`
    is the job's round that it is for: a word of one round never stands in the place of a later
    one's, and a bucket whose ETags are hashes tells the words of two rounds apart. `tail`
    grows each time somebody asks for what running tasks print, the last time at `tail_s` (epoch)
    (see worker.tails). `number` counts the words before it, so no two words of a job are equal."""

    control: Control
    state: JobState = JobState.CANCELLED
    reason: str = ""
    round: int = 0
    tail: int = 0
    tail_s: float | None = None
    number: int = field(default=0, compare=False)


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
    if word.number:
        doc["number"] = word.number
    return to_bytes(doc)


def word_from_bytes(data: bytes) -> Word:
    """BackendError where it cannot be read: whoever asks whether a task may start then knows of no
    word that allows it."""
    doc = loads(data)
    try:
        tail_s = doc.get("tail_s")
        return Word(
            Control(doc["control"]),
            JobState(doc.get("state", "CANCELLED")),
            text(doc.get("reason", "")),
            whole(doc.get("round", 0)),
            whole(doc.get("tail", 0)),
            None if tail_s is None else figure(tail_s),
            whole(doc.get("number", 0)),
        )
    except UNREADABLE as error:
        said = doc.get("control")
        if isinstance(said, str) and said not in WORDS:
            raise TooNew(f"The word {said[:40]!r} is not known to this batchlab.") from error
        raise Malformed(f"A control object cannot be read: {brief(error)}.") from error


def ending_to_json(e: Ending) -> dict[str, Json]:
    return {"v": VERSION, **fields(e)}


def ending_from_json(doc: dict[str, Any]) -> Ending:
    """Return the ending in a document; Malformed if it is not one."""
    try:
        closed = {StageName(name(k)): whole(v, MOST_COUNT) for k, v in doc["closed"].items()}
        state = JobState(doc["state"])
        return Ending(state, text(doc["reason"]), figure(doc["ended_s"]), closed)
    except UNREADABLE as error:
        raise Malformed(f"The end of a job cannot be read: {brief(error)}.") from error
