"""JSON format of jobs, cuts, bundles, outcomes, completions, control commands, and endings.

Invariant: `x_from_json(x_to_json(x)) == x`. A reader of a document ignores fields that a later batchlab added. If
readers must know a new field, the later batchlab increases `v` in the document, or `needs` in the job. Readers refuse a
document with an unknown `v` or `needs`. Outcomes, completions, and bundles have hand-written converters, because
generic conversion by a table of fields takes up to five times as long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from batchlab.core.errors import BatchlabError, Deleted, Malformed, TooNew
from batchlab.core.job_definition import JobDef, StageDef
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
    TaskMetrics,
    TaskSet,
)
from batchlab.core.ports import Cut, Ending, Reopening
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.field_checks import (
    MAX_COUNT,
    MAX_IN_BUNDLE,
    MAX_INPUT_NAME,
    MAX_ROUNDS,
    MAX_TASKS,
    UNREADABLE,
    decode,
    figure,
    figures,
    flag,
    handler,
    integer,
    label,
    list_items,
    name,
    new_label,
    shallow,
    text,
    whole,
)
from batchlab.core.protocol.values import BRACKET_WEIGHT, OUTCOME_WEIGHT, weight
from batchlab.core.users import is_user_name

T = TypeVar("T")
Known = tuple[Any, TaskSet]
"""The JSON of a set of tasks, together with the TaskSet that was read from the JSON."""

VERSION = 1
MENDED = 2
"""Format of the messages and retries with mended inputs. A release that does not know mended inputs refuses them.

A worker of an earlier release returns the message, and a manager of an earlier release ends the round of the retry.
"""
PROTOCOL = 4
"""Latest version of the protocol that this release of batchlab supports.

A release increases PROTOCOL if some jobs need new behavior of workers or managers, and writes the new version as
`needs` into only those jobs.
"""
SEALED = 2
"""First protocol version with commit keys."""
DEPENDENT = 3
"""First protocol version with dependencies. A manager of an earlier release would begin the job at once."""
GPUS = 4
"""First protocol version with GPUs. A worker of an earlier release would give one GPU to several tasks."""
FAILURE_KINDS = frozenset(kind.value for kind in FailureKind)
CONTROL_VALUES = frozenset(word.value for word in Control)
NO_TASKS = TaskSet()
# The check for cyclic values is off, because the encoding of a task's result already detects cyclic values.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False).encode


def dumps(value: Json) -> str:
    """Return a value as compact JSON. Raise ValueError for NaN and infinity."""
    return _encode(value)  # json.dumps with options creates an encoder for each call


def to_bytes(value: Json) -> bytes:
    return dumps(value).encode()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode


def is_too_heavy(data: bytes | str) -> bool:
    """Return whether the weight of a JSON text exceeds OUTCOME_WEIGHT."""
    # Skip the slow count of brackets if the text is too short to exceed the maximum weight.
    if len(data) * (1 + BRACKET_WEIGHT) <= OUTCOME_WEIGHT:
        return False
    return weight(data if isinstance(data, str) else data.decode("latin-1")) > OUTCOME_WEIGHT


def loads(data: bytes | str, *, known: int = VERSION) -> dict[str, Any]:
    """Return the document in a JSON text. The document must have a version from VERSION to `known`.

    Raise TooNew if a later version wrote the document, and Malformed if `data` is not a document of batchlab.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        doc = _decode(text)
        if "\\u" in text and ("\\ud" in text or "\\uD" in text):
            # An escaped half of a surrogate pair is valid JSON, but cannot be encoded as UTF-8.
            dumps(doc).encode()
    except UNREADABLE as error:
        raise Malformed(f"This is not a JSON text that batchlab reads: {brief(error)}.") from error
    version = doc.get("v") if isinstance(doc, dict) else None
    if isinstance(doc, dict) and type(version) is int:
        if VERSION <= version <= known:
            return doc
        if version > known:
            raise TooNew(
                f"A stored object is in format {version:.6g}, and this batchlab knows {known}.",
                remedy="It was written by a newer version.",
            )
    raise Malformed("A stored object is not in a format this batchlab knows.")


def brief(error: Exception) -> str:
    """Return the error's description in at most 200 characters, without text that a worker chose."""
    if isinstance(error, BatchlabError):
        return error.message.rstrip(".")[:200]
    if isinstance(error, KeyError):
        return "a field is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeError):
        is_decoding = isinstance(error, UnicodeDecodeError)
        return "it is not UTF-8 text" if is_decoding else "it has an incomplete surrogate pair"
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        return f"{json_mistake(error)} at line {error.lineno}, column {error.colno}"
    text = str(error) if type(error) is ValueError else type(error).__name__
    return text[:200]


def json_mistake(error: json.JSONDecodeError) -> str:
    """Return Python's description of a mistake in JSON, to which the caller appends the position."""
    return f"{error.msg[:1].lower()}{error.msg[1:]}".removesuffix(" at")[:100]


def fields(value: Any) -> dict[str, Json]:
    """Return the fields of a dataclass value by name.

    `dataclasses.asdict` would also convert nested values, and would take ten times as long as this function.
    """
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def tasks_to_json(tasks: TaskSet) -> list[list[int]]:
    return [[start, stop] for start, stop in tasks.ranges]


def tasks_from_json(doc: Sequence[Sequence[int]], known: Known | None = None) -> TaskSet:
    """Return the tasks in a document. `known` is the JSON and the task set of the bundle. If `doc` equals the JSON in
    `known`, return the task set in `known`.
    """
    if known and doc == known[0]:
        return known[1]
    if not list_items(doc):
        return NO_TASKS
    ranges: list[tuple[int, int]] = []
    for start, stop in doc:
        if type(start) is not int or type(stop) is not int or stop > MAX_TASKS:
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
    if not 0 < len(tasks) <= MAX_IN_BUNDLE:
        raise ValueError(f"a bundle of 1 to {MAX_IN_BUNDLE} tasks is expected")
    return Bundle(
        JobId(name(doc["j"])),
        StageName(name(doc["s"])),
        tasks,
        whole(doc["a"]),
        whole(doc["r"], MAX_ROUNDS) if "r" in doc else 0,
        whole(doc["l"]) if "l" in doc else 0,
        BundleId(new_label(source)) if source else None,
        figure(doc["w"]) if "w" in doc else None,
    )


def _follow_to_json(f: Follow) -> dict[str, Json]:
    return {"b": bundle_to_json(f.bundle), "d": f.delay_s}


def _follow_from_json(doc: dict[str, Any], known: Known | None = None) -> Follow:
    return Follow(bundle_from_json(doc["b"], known), figure(doc["d"]))


def _follows_from_json(docs: Any, known: Known) -> tuple[Follow, ...]:
    return tuple([_follow_from_json(doc, known) for doc in list_items(docs)]) if docs != [] else ()


def _each(read: Callable[[Any], T], docs: Any) -> tuple[T, ...]:
    """Return the result of `read` for each document in a list."""
    return tuple([read(doc) for doc in list_items(docs)]) if docs != [] else ()


def _failure_to_json(failure: Failure) -> dict[str, Json]:
    doc = fields(failure)
    if not failure.pickled:
        del doc["pickled"]  # Only the failures of the Python API have a pickled exception.
    return doc


def _failure_from_json(doc: dict[str, Any]) -> Failure:
    code = doc.get("exit_code")
    return Failure(
        whole(doc["task"], MAX_TASKS),
        FailureKind(doc["kind"]),
        text(doc["reason"]),
        text(doc.get("error", "")),
        text(doc.get("traceback", "")),
        None if code is None else integer(code),
        figure(doc.get("run_s", 0.0)),
        flag(doc.get("final", True)),
        text(doc.get("pickled", "")),
    )


def _span_from_json(doc: Sequence[Any]) -> tuple[int, int, int]:
    task, start, stop = doc
    if whole(start) > whole(stop):
        raise ValueError("a span of a log ends before it begins")
    return whole(task, MAX_TASKS), start, stop


def _metrics_from_json(doc: Sequence[Any]) -> tuple[int, TaskMetrics]:
    task, cpu_s, *sizes, input_name = doc
    memory_bytes, input_bytes, output_bytes = (None if size is None else whole(size) for size in sizes)
    cpu_s = None if cpu_s is None else figure(cpu_s)
    metrics = TaskMetrics(cpu_s, memory_bytes, input_bytes, output_bytes, text(input_name, MAX_INPUT_NAME))
    return whole(task, MAX_TASKS), metrics


def check_parts(
    bundle: Bundle, succeeded: TaskSet, failed: TaskSet, cancelled: TaskSet, follows: Sequence[Follow]
) -> None:
    """Raise ValueError unless every task of the bundle has exactly one result.

    The result of a task is success, final failure, cancellation, or one follow-up of the same stage (see
    `settlement.settle`).
    """
    if succeeded.ranges == bundle.tasks.ranges and not (follows or failed.ranges or cancelled.ranges):
        return
    parts = [succeeded]
    if failed.ranges:
        parts.append(failed)
    if cancelled.ranges:
        parts.append(cancelled)
    for follow in follows:
        bundle_after = follow.bundle
        if bundle_after.job != bundle.job or bundle_after.round != bundle.round:
            raise ValueError("a follow is a bundle of another job or round")
        if bundle_after.stage != bundle.stage:
            inside = bundle_after.tasks.ranges == succeeded.ranges or not bundle_after.tasks - succeeded
            if bundle_after.source != bundle.id or not inside:
                raise ValueError("a follow in another stage is not fed by this bundle")
            continue
        again = bundle_after.attempt == bundle.attempt + 1
        if not again and (bundle_after.attempt != bundle.attempt or bundle_after.tasks == bundle.tasks):
            raise ValueError("a follow in the same stage has a wrong attempt")
        if bundle_after.source != bundle.source:
            raise ValueError("a follow in the same stage has another source")
        parts.append(bundle_after.tasks)
    if len(parts) == 1 and succeeded.ranges == bundle.tasks.ranges:
        return
    if sum(map(len, parts)) != len(bundle.tasks) or TaskSet.union(parts) != bundle.tasks:
        raise ValueError("the tasks of its parts are not those of the bundle")


def outcome_to_json(o: Outcome) -> dict[str, Json]:
    doc: dict[str, Json] = {
        "v": VERSION,
        "bundle": bundle_to_json(o.bundle),
        "execution": o.execution,
        "worker": o.worker,
        "started_s": o.started_s,
        "ended_s": o.ended_s,
        "succeeded": tasks_to_json(o.succeeded),
        "values": o.values,
        "run_s": o.run_s,
        "failed": [_failure_to_json(f) for f in o.failed],
        "cancelled": tasks_to_json(o.cancelled),
        "follows": [_follow_to_json(f) for f in o.follows],
        "log": o.log,
        "log_spans": o.log_spans,
    }
    if o.metrics:
        doc["metrics"] = [(task, *metrics) for task, metrics in o.metrics]
    return doc


def outcome_text(o: Outcome) -> str:
    """Return the JSON of an outcome. The JSON is created once and cached."""
    try:
        return o._text
    except AttributeError:
        text = dumps(outcome_to_json(o))
        object.__setattr__(o, "_text", text)
        return text


def fitting(outcome: Outcome) -> Outcome:
    """Return the outcome. If it exceeds the maximum weight, remove its tracebacks and metrics, and if it is still too
    heavy, its pickled exceptions.

    The weight of an outcome's values is always below the maximum weight (see `worker.task_executor`).
    """
    if not is_too_heavy(outcome_text(outcome)):
        return outcome
    failed = tuple([replace(failure, traceback="") for failure in outcome.failed])
    lighter = replace(outcome, failed=failed, metrics=())
    if not is_too_heavy(outcome_text(lighter)):
        return lighter
    return replace(lighter, failed=tuple([replace(failure, pickled="") for failure in failed]))


def outcome_from_json(doc: dict[str, Any]) -> Outcome:
    """Return the outcome in a document. Raise one of UNREADABLE if the document is not an outcome."""
    bundle = bundle_from_json(doc["bundle"])
    known = doc["bundle"]["t"], bundle.tasks
    succeeded = tasks_from_json(doc["succeeded"], known)
    cancelled = tasks_from_json(doc["cancelled"])
    values, run_s = list_items(doc["values"]), figures(doc["run_s"])
    if not len(values) == len(run_s) == len(succeeded):
        raise ValueError("there is not one value and one run time for each task that succeeded")
    shallow(values)
    failed = _each(_failure_from_json, doc["failed"])
    final = TaskSet.from_indices([f.task for f in failed if f.final]) if failed else NO_TASKS
    follows = _follows_from_json(doc["follows"], known)
    check_parts(bundle, succeeded, final, cancelled, follows)
    if failed:
        tasks = {f.task for f in failed}
        if len(tasks) != len(failed) or TaskSet.from_indices(tasks) - bundle.tasks:
            raise ValueError("failures are not of one task of the bundle each")
    log = text(doc["log"])
    if log and not log.startswith(object_keys.logs(bundle.job)):
        raise ValueError("the log is not a log of its job")
    metrics = _each(_metrics_from_json, doc.get("metrics", ()))
    if metrics and (
        len({task for task, _ in metrics}) != len(metrics) or any(t not in bundle.tasks for t, _ in metrics)
    ):
        raise ValueError("metrics are not of one task of the bundle each")
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
        metrics,
    )


def outcome_from_bytes(data: bytes, key: str) -> Outcome:
    """Return the outcome in the object `key`, which is the key of an outcome or of a replacement.

    Raise Malformed, with the key, if the object cannot be read, has a later format, or is the outcome of another
    bundle. A later version number is always an error, because a release that can read a job's definition can read all
    outcomes of the job (see PROTOCOL). Therefore a worker cannot block a job by writing a later version number.
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
    """Return the error for an object that cannot be read."""
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
    """Return the completion in a document. Raise one of UNREADABLE if the document is not a completion.

    The reader of a message from a worker must also call `check_parts` for the completion.
    """
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
        whole(doc["re"], MAX_IN_BUNDLE),
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
    """Return the cut in a document.

    Raise Malformed if the document is not a cut, or if the cut has a bundle of another job, stage, or round.
    """
    try:
        at_s, planned = doc.get("at"), doc["planned"]
        cut = Cut(
            JobId(name(doc["j"])),
            StageName(name(doc["s"])),
            whole(doc["round"]),
            whole(doc["seq"]),
            tuple([bundle_from_json(b) for b in list_items(doc["bundles"])]),
            tasks_from_json(doc["left"]),
            None if planned is None else whole(planned, MAX_TASKS),
            None if at_s is None else figure(at_s),
        )
        own = (cut.job, cut.stage, cut.round)
        if any((bundle.job, bundle.stage, bundle.round) != own for bundle in cut.bundles):
            raise ValueError("it has a bundle of another job, stage or round")
        return cut
    except UNREADABLE as error:
        raise Malformed(f"A cut cannot be read: {brief(error)}.") from error


def reopening_to_json(r: Reopening) -> dict[str, Json]:
    return fields(r)


def reopening_from_json(doc: dict[str, Any]) -> Reopening:
    """Return the reopening in a document. Raise one of UNREADABLE if the document is not a reopening."""
    return Reopening(
        StageName(name(doc["stage"])),
        whole(doc.get("succeeded", 0)),
        whole(doc.get("failed", 0)),
        whole(doc.get("cancelled", 0)),
        flag(doc.get("replan", False)),
    )


def job_to_json(job: JobDef) -> dict[str, Json]:
    doc = {"v": VERSION, **fields(job)}
    doc["stages"] = [_stage_to_json(stage) for stage in job.stages]
    doc["input"] = fields(job.input) if job.input else None
    # Omit empty fields that earlier releases do not know, so that earlier releases can read the job.
    if job.max_cost_usd is None:
        del doc["max_cost_usd"]
    if not job.trace:
        del doc["trace"]
    if not job.share:
        del doc["share"]
    if not job.owner:
        del doc["owner"]
    if job.after:
        doc["after"] = [fields(dependency) for dependency in job.after]
        doc["needs"] = DEPENDENT
    else:
        del doc["after"]
    if any(stage.gpus for stage in job.stages):
        doc["needs"] = GPUS
    if job.commit_hash:
        doc.setdefault("needs", SEALED)
    else:
        del doc["commit_hash"]
    if job.notify:
        doc["notify"] = [fields(notify_def) for notify_def in job.notify]
    else:
        del doc["notify"]
    return doc


def _stage_to_json(stage: StageDef) -> dict[str, Json]:
    doc = {**fields(stage), "retry": fields(stage.retry)}
    for later in ("side_effects", "speculative_copies", "gpus"):
        if not doc[later]:
            del doc[later]
    return doc


_STAGE_FIELDS = {"after", "command", "handler", "retry"}
"""Fields of a stage's JSON that every release writes.

A reader refuses a stage that lacks a field of _STAGE_FIELDS, and does not use a default for the field.
"""


_DELETED = "deleted"
MAX_NOTE_BYTES = 1000
"""Maximum size of the result of `deleted_job`."""


def deleted_job(job: JobId) -> bytes:
    """Return the note that replaces the definition of a deleted job."""
    return to_bytes({"v": VERSION, "id": job, _DELETED: True})


def is_deleted(doc: dict[str, Any]) -> bool:
    """Return whether the document of a job or of a retry is a note that a user has deleted the job."""
    return doc.get(_DELETED) is True


def due_sweep(job: JobId, due_s: float) -> bytes:
    """Return the content of the request to delete a job after the deletion, until the sweep at the time `due_s`."""
    return to_bytes({"v": VERSION, "id": job, "sweep_s": due_s})


def sweep_time(request: bytes) -> float | None:
    """Return the time of the sweep in a request to delete a job, or None if the deletion has not finished."""
    due_s = loads(request).get("sweep_s")
    return float(due_s) if isinstance(due_s, (int, float)) else None


def job_from_json(doc: dict[str, Any]) -> JobDef:
    """Return the job in a spec object or in the result of `job_to_json`.

    Raise Deleted if a user has deleted the job. Raise TooNew if the job needs a later version of the protocol, or if
    the job's definition cannot be read.
    """
    if is_deleted(doc):
        raise Deleted("The job was deleted.")
    needs = doc.get("needs", 1)
    if not isinstance(needs, int) or not 1 <= needs <= PROTOCOL:
        raise TooNew(
            f"The job needs protocol {needs}, and this batchlab knows {PROTOCOL}.",
            remedy="It was submitted to a newer version.",
        )
    try:
        if any(_STAGE_FIELDS - stage.keys() for stage in doc["stages"]):
            raise ValueError("a stage lacks a field")
        job = decode(JobDef, doc)
        for id_ in (job.id, *(dependency.job for dependency in job.after)):
            name(id_)
        if job.owner and not is_user_name(job.owner):
            raise ValueError("the owner is not the name of a user")
        for stage in job.stages:
            name(stage.name)
            if stage.handler is not None:
                handler(stage.handler)
        return job
    except UNREADABLE as error:
        why = brief(error)
        raise TooNew(f"The job's definition cannot be read by this batchlab: {why}.") from error


MAX_CONTROL_BYTES = 2**20
"""Maximum size of a control object. A larger control object cannot be read."""


@dataclass(frozen=True, slots=True)
class ControlCommand:
    """Content of a control object.

    With CANCEL, `state` and `reason` are the final state of the job and its reason. `round` is the round of the job to
    which the command applies. A command never replaces the command of a later round. The commands of different rounds
    have different contents and therefore different ETags, even if an ETag is a hash of the content. `tail` grows with
    each request for live logs, and `tail_s` (epoch) is the time of the last request (see `worker.live_logs`). `number`
    is the number of earlier commands of the job, so all commands of a job differ.
    """

    control: Control
    state: JobState = JobState.CANCELLED
    reason: str = ""
    round: int = 0
    tail: int = 0
    tail_s: float | None = None
    number: int = field(default=0, compare=False)


def control_to_bytes(command: ControlCommand) -> bytes:
    doc: dict[str, Any] = {"v": VERSION, "control": command.control.value}
    if command.control is Control.CANCEL:
        doc |= {"state": command.state.value, "reason": command.reason, "round": command.round}
    elif command.round:
        doc["round"] = command.round
    if command.tail:
        doc["tail"] = command.tail
        if command.tail_s is not None:
            doc["tail_s"] = command.tail_s
    if command.number:
        doc["number"] = command.number
    return to_bytes(doc)


def control_from_bytes(data: bytes) -> ControlCommand:
    """Return the command in a control object.

    Raise BackendError if the command cannot be read. A caller that cannot read the command must not start tasks.
    """
    doc = loads(data)
    try:
        tail_s = doc.get("tail_s")
        return ControlCommand(
            Control(doc["control"]),
            JobState(doc.get("state", "CANCELLED")),
            text(doc.get("reason", "")),
            whole(doc.get("round", 0)),
            whole(doc.get("tail", 0)),
            None if tail_s is None else figure(tail_s),
            whole(doc.get("number", 0)),
        )
    except UNREADABLE as error:
        control = doc.get("control")
        if isinstance(control, str) and control not in CONTROL_VALUES:
            raise TooNew(f"This batchlab does not know the control command {control[:40]!r}.") from error
        raise Malformed(f"A control object cannot be read: {brief(error)}.") from error


def ending_to_json(e: Ending) -> dict[str, Json]:
    return {"v": VERSION, **fields(e)}


def ending_from_json(doc: dict[str, Any]) -> Ending:
    """Return the ending in a document. Raise Malformed if the document is not an ending."""
    try:
        closed = {StageName(name(k)): whole(v, MAX_COUNT) for k, v in doc["closed"].items()}
        state = JobState(doc["state"])
        return Ending(state, text(doc["reason"]), figure(doc["ended_s"]), closed)
    except UNREADABLE as error:
        raise Malformed(f"The end of a job cannot be read: {brief(error)}.") from error
