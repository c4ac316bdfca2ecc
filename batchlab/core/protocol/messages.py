"""Messages on the queues, and the format of live logs.

A message contains either a bundle for a worker, or events from a worker for the manager. Live logs contain the output
of running tasks while a client follows the tasks.

Invariant: `read_x(x(m)) == m` for all parts of a message that its reader needs. Messages have the format of
`json_format`. If any part of a message is invalid, the reader raises Malformed and ignores the whole message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

from batchlab.core.errors import Malformed, TooNew
from batchlab.core.job_definition import MAX_GPUS
from batchlab.core.model import Bundle, BundleId, Completion, JobId, Json, Outcome, StageName
from batchlab.core.ports import MAX_MESSAGE_BYTES
from batchlab.core.pricing.request_costs import Requests, WorkerRequests
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import (
    UNREADABLE,
    bundle_name,
    decode,
    figure,
    flag,
    label,
    list_items,
    name,
    shallow,
    text,
    whole,
)
from batchlab.core.protocol.json_format import (
    MENDED,
    VERSION,
    brief,
    bundle_from_json,
    bundle_to_json,
    check_parts,
    completion_from_json,
    completion_to_json,
    dumps,
    fields,
    loads,
    outcome_from_json,
    outcome_text,
)
from batchlab.core.protocol.mended_inputs import is_mended
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey

T = TypeVar("T")

MAX_SLOTS = 1 << 20
MAX_REQUESTS = 1e15
MAX_RECEIPT = 2048
"""Maximum length of a receipt in characters. A receipt handle of SQS has at most 1,024 characters."""
MAX_TRACE = 200
MAX_KEY = 1024
_COUNTED = len(Requests.__slots__)


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """Message with a bundle on a pool's queue.

    `items` has the encoded input of each task of the bundle, or is None if the inputs are too large for the message.
    `not_before_s` (epoch) is the end of a delay that is longer than the maximum DelaySeconds. `watchdog` is true for a
    watchdog message. The bundle of a watchdog message is running, and runs again only if its worker has stopped sending
    heartbeats. `trace` is the W3C traceparent of the sender if the job is traced. `key` is the commit key of the job. A
    worker compares the commit key with its hash in the job's definition.
    """

    bundle: Bundle
    items: Sequence[Json] | None = None
    not_before_s: float | None = None
    watchdog: bool = False
    trace: str = ""
    key: CommitKey = UNSEALED
    reply: str = ""
    """Name at which a client on the worker's machine waits for the outcome, or "" (see `ports.Replies`)."""
    copy_s: float | None = None
    """Maximum run time in seconds of a speculative copy, or None if the message is not a speculative copy.

    Another worker holds the bundle of a speculative copy, so a worker may drop the copy at any time.
    """
    expected_s: Mapping[StageName, float] = field(default_factory=dict)
    """Expected run time in seconds of one task, for the stage of the bundle and for the stages that are chained after
    it. A stage without enough measured tasks is missing."""

    @property
    def run_s(self) -> float | None:
        """Return the expected run time of the bundle in seconds, or None if it is unknown."""
        task_s = self.expected_s.get(self.bundle.stage)
        return None if task_s is None else task_s * len(self.bundle.tasks)


def task_message(m: TaskMessage) -> str:
    version = MENDED if is_mended(m.bundle) else VERSION
    doc: dict[str, Json] = {"v": version, "b": bundle_to_json(m.bundle)}
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
    if m.reply:
        doc["re"] = m.reply
    if m.copy_s is not None:
        doc["cp"] = m.copy_s
    if m.expected_s:
        doc["ex"] = {str(stage): task_s for stage, task_s in m.expected_s.items()}
    return dumps(doc)


def read_task_message(body: str) -> TaskMessage:
    """Return the task message in the body of a queue message.

    Raise TooNew if a later batchlab sent the message, and Malformed if the message cannot be read.
    """
    return _read(body, "A task message", _task_message_from_json, known=MENDED)


def _task_message_from_json(doc: dict[str, Any]) -> TaskMessage:
    bundle = bundle_from_json(doc["b"])
    items, not_before_s = doc.get("in"), doc.get("nb")
    if items is not None:
        if len(list_items(items)) != len(bundle.tasks):
            raise ValueError("there is not one item for each task")
        shallow(items)
    return TaskMessage(
        bundle,
        items,
        None if not_before_s is None else figure(not_before_s),
        flag(doc.get("wd", False)),
        text(doc.get("tp", ""), MAX_TRACE),
        CommitKey(text(doc.get("ck", UNSEALED), MAX_TRACE)),
        label(doc["re"]) if "re" in doc else "",
        figure(doc["cp"]) if "cp" in doc else None,
        {StageName(name(stage)): figure(task_s) for stage, task_s in doc.get("ex", {}).items()},
    )


def _read(body: str, what: str, read: Callable[[dict[str, Any]], T], *, known: int = VERSION) -> T:
    """Return the result of `read` for the document in `body`. The text of a Malformed error begins with `what`."""
    try:
        # Compare the number of characters and not of bytes with the limit, because counting the bytes would require
        # encoding the text.
        if len(body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"it has {len(body)} characters")
        return read(loads(body, known=known))
    except TooNew:
        raise
    except (Malformed, *UNREADABLE) as error:
        raise Malformed(f"{what} cannot be read: {brief(error)}.") from error


@dataclass(frozen=True, slots=True)
class HeldBundle:
    """A bundle that a worker holds. If the worker's instance dies, the manager makes the bundle's message visible.

    `receipt` is None if a watchdog message has taken over the bundle.
    """

    queue: str
    receipt: str | None
    job: JobId
    stage: StageName
    bundle: BundleId
    running: bool


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's heartbeat.

    `held` has all bundles that the worker held at `at_s`. `leaving` is true if the worker is draining.
    """

    worker: str
    instance: str
    pool: str
    at_s: float
    slots: int
    busy: int
    held: tuple[HeldBundle, ...]
    number: int
    """Number of the heartbeat. The number gives the order of heartbeats, because queues may deliver heartbeats in
    another order and clocks may jump.
    """
    leaving: bool = False
    gone: bool = False
    """Whether the heartbeat is the worker's last heartbeat, sent after the worker has returned all of its messages."""
    key: str = field(default="", repr=False)
    """Key of the worker's instance, a secret that all workers of the instance share, or "" for a worker of release
    0.1.0.
    """
    gpus: int = 0
    busy_gpus: int = 0
    """Number of GPUs that running tasks use."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Duplicate work that a worker noticed.

    `kind` is "message" if the worker received a message of a bundle with an outcome. `kind` is "execution" if the
    worker's execution ended after another execution had committed, and `slot_s` has the slot seconds of the worker's
    execution. `execution` is the id of the worker's execution. The id identifies the duplicate, so a repeated report of
    a duplicate counts only once.
    """

    job: JobId
    stage: StageName
    kind: str
    execution: str
    slot_s: float


@dataclass(frozen=True, slots=True)
class CounterReport:
    """Counters of a worker since its start, by name (see `worker.outbox`)."""

    worker: str
    counts: Mapping[str, int]


Traces = tuple[tuple[JobId, StageName, BundleId, str], ...]
"""Trace context for the follow-ups of each bundle, as a W3C traceparent."""


@dataclass(frozen=True, slots=True)
class Events:
    """The body of one message on the events queue."""

    completions: tuple[Completion, ...] = ()
    committed: tuple[str, ...] = ()
    """Keys of outcomes whose completions are too large for a message. The reader of the message fetches the outcomes.
    """
    beats: tuple[Beat, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    """Small outcomes that are sent instead of completions, so that clients that wait for results do not need to fetch
    the outcomes.
    """
    requests: tuple[WorkerRequests, ...] = ()
    """Request counts of workers, sent together with heartbeats."""
    duplicates: tuple[Duplicate, ...] = ()
    counters: tuple[CounterReport, ...] = ()
    """Counters of workers, sent together with heartbeats."""
    traces: Traces = ()
    """Trace context of each outcome in the message that belongs to a traced job."""


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
    if e.requests:
        texts["q"] = dumps([[a.worker, a.instance, a.is_spot, *a.requests.counts] for a in e.requests])
    if e.duplicates:
        texts["d"] = dumps([list(astuple(d)) for d in e.duplicates])
    if e.counters:
        texts["m"] = dumps([[t.worker, t.counts] for t in e.counters])
    if e.traces:
        texts["tp"] = dumps(e.traces)
    pairs = (f'"{key}":{text}' for key, text in texts.items())
    return f"{{{','.join(pairs)}}}"


def _beat_to_json(b: Beat) -> dict[str, Json]:
    doc = {**fields(b), "held": [fields(h) for h in b.held]}
    if not b.key:
        del doc["key"]
    if not b.gpus:
        del doc["gpus"], doc["busy_gpus"]
    return doc


def _check_completion(c: Completion) -> Completion:
    check_parts(c.bundle, c.succeeded, c.failed, c.cancelled, c.follows)
    return c


def _beat_from_json(doc: Mapping[str, Any]) -> Beat:
    return Beat(
        label(doc["worker"]),
        label(doc["instance"]),
        label(doc["pool"]),
        figure(doc["at_s"]),
        whole(doc["slots"], MAX_SLOTS),
        whole(doc["busy"], MAX_SLOTS),
        tuple([_held_from_json(h) for h in list_items(doc["held"])]),
        whole(doc["number"]),
        flag(doc.get("leaving", False)),
        flag(doc.get("gone", False)),
        text(doc.get("key", ""), MAX_TRACE),
        whole(doc.get("gpus", 0), MAX_GPUS),
        whole(doc.get("busy_gpus", 0), MAX_GPUS),
    )


def _held_from_json(doc: Mapping[str, Any]) -> HeldBundle:
    receipt = doc["receipt"]
    return HeldBundle(
        label(doc["queue"]),
        None if receipt is None else text(receipt, MAX_RECEIPT),
        JobId(name(doc["job"])),
        StageName(name(doc["stage"])),
        BundleId(bundle_name(doc["bundle"])),
        flag(doc["running"]),
    )


def _asked_from_json(doc: Sequence[Any]) -> WorkerRequests:
    worker, instance, is_spot, *counts = list_items(doc)
    requests = Requests(*[figure(count, MAX_REQUESTS) for count in counts[:_COUNTED]])
    return WorkerRequests(label(worker), label(instance), requests, flag(is_spot))


def _duplicate_from_json(doc: Sequence[Any]) -> Duplicate:
    job, stage, kind, execution, slot_s, *_ = list_items(doc)
    return Duplicate(JobId(name(job)), StageName(name(stage)), label(kind), label(execution), figure(slot_s))


def _told_from_json(doc: Sequence[Any]) -> CounterReport:
    worker, counts = list_items(doc)
    return CounterReport(label(worker), {label(key): whole(count) for key, count in counts.items()})


def _trace_from_json(doc: Sequence[Any]) -> tuple[JobId, StageName, BundleId, str]:
    job, stage, bundle, trace = list_items(doc)
    return (JobId(name(job)), StageName(name(stage)), BundleId(bundle_name(bundle)), text(trace, MAX_TRACE))


def _key_from_json(value: Any) -> str:
    if object_keys.outcome_key(text(value, MAX_KEY)) is None:
        raise ValueError("a key is not that of an outcome")
    return str(value)


def read_events_message(body: str) -> Events:
    """Return the events in a message.

    Raise TooNew if a later batchlab sent the message, and Malformed if any part of the message cannot be read.
    """
    return _read(body, "An event", _events_from_json)


def _events_from_json(doc: dict[str, Any]) -> Events:
    # Skip absent parts of a message to save time, because most messages have only one or two parts.
    return Events(
        tuple([_check_completion(completion_from_json(c)) for c in list_items(doc["c"])]) if "c" in doc else (),
        tuple([_key_from_json(key) for key in list_items(doc["k"])]) if "k" in doc else (),
        tuple([_beat_from_json(b) for b in list_items(doc["h"])]) if "h" in doc else (),
        tuple([outcome_from_json(o) for o in list_items(doc["o"])]) if "o" in doc else (),
        tuple([_asked_from_json(a) for a in list_items(doc["q"])]) if "q" in doc else (),
        tuple([_duplicate_from_json(d) for d in list_items(doc["d"])]) if "d" in doc else (),
        tuple([_told_from_json(t) for t in list_items(doc["m"])]) if "m" in doc else (),
        tuple([_trace_from_json(t) for t in list_items(doc["tp"])]) if "tp" in doc else (),
    )


ASKED_S = 30.0
"""Time in seconds for which a worker stores live logs after a request.

A client that follows a job requests live logs twice in ASKED_S seconds.
"""


@dataclass(frozen=True, slots=True)
class Tail:
    """The latest output of a running attempt: bytes [start, stop) of the attempt's output."""

    stage: str
    task: int
    attempt: int
    round: int
    bundle: str
    execution: str
    start: int
    stop: int
    text: str


def to_bytes(tails: list[Tail]) -> bytes:
    return json_format.to_bytes({"v": json_format.VERSION, "tails": [json_format.fields(tail) for tail in tails]})


def from_bytes(data: bytes) -> list[Tail]:
    """Return the live logs in an object. Raise Malformed if the live logs cannot be read."""
    doc: dict[str, Any] = json_format.loads(data)
    try:
        return [decode(Tail, one) for one in list_items(doc["tails"])]
    except UNREADABLE as error:
        raise Malformed(f"Live logs cannot be read: {json_format.brief(error)}.") from error
