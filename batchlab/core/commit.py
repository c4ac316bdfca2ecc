"""Functions that commit an outcome, send its follow-ups, and read or write control objects.

Invariant (I1): an outcome is written once, by one conditional PUT. A worker that finds a committed outcome discards its
own result and continues with the committed outcome. Every step after the commit of an outcome may be repeated.

A job's control object permits or forbids the start of tasks. The content of a control object is a `ControlCommand`. A
write to a control object succeeds only if the replaced command has not changed. A command contains the job's round and
the number of earlier commands, because equal contents would have equal ETags on S3.

Invariant: a write of a command that arrives late never replaces a later command.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from batchlab.core.errors import AlreadyExists, Malformed, NotFound, TooLarge, TooNew
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Control, Follow, JobId, Json, Outcome, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import MAX_BATCH, MAX_DELAY_S, MAX_MESSAGE_BYTES, Objects, Outgoing, Queue
from batchlab.core.protocol import json_format, object_keys, settlement
from batchlab.core.protocol.json_format import MAX_CONTROL_BYTES, ControlCommand
from batchlab.core.protocol.messages import TaskMessage, task_message
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.protocol.values import OUTCOME_WEIGHT

INLINE_BYTES = 60_000
"""Maximum size in bytes of the inputs that a message contains.

Workers fetch larger inputs from the bucket. SQS bills each started 64 KB as a request, so a message within the limit
INLINE_BYTES costs one request.
"""


async def commit(objects: Objects, outcome: Outcome, patience: Patience, key: CommitKey) -> Outcome:
    """Commit `outcome` and return the committed outcome, which may be the outcome of another execution."""
    name = object_keys.outcome(outcome.bundle, key)
    data = json_format.outcome_text(outcome).encode()
    try:
        await patience(lambda: objects.put(name, data, if_absent=True))
    except AlreadyExists:
        # AlreadyExists means that another worker committed first, or that the response to an earlier write of this
        # worker was lost. After AlreadyExists, the stored outcome is the committed outcome.
        stored = await committed(objects, outcome.bundle, patience, key)
        if stored is None:
            raise NotFound(f"The object {name!r} exists but cannot be found.") from None
        return stored
    return outcome


def outcome_at(name: str, data: bytes, key: CommitKey) -> Outcome:
    """Return the outcome in the object `name`.

    Raise Malformed if the outcome is unreadable or if `key` did not seal `name`.
    """
    outcome = json_format.outcome_from_bytes(data, name)
    if object_keys.outcome(outcome.bundle, key) != name:
        raise Malformed(f"The outcome {name} has a wrong seal.")
    return outcome


async def committed(objects: Objects, bundle: Bundle, patience: Patience, key: CommitKey) -> Outcome | None:
    """Return the committed outcome of `bundle`, or None if the bundle does not have an outcome yet.

    If the object of the outcome cannot be read, return the replacement that the manager committed. Raise Malformed if
    the replacement does not exist.
    """
    try:
        return await read_outcome(objects, object_keys.outcome(bundle, key), patience)
    except NotFound:
        return None
    except Malformed:
        try:
            return await read_outcome(objects, object_keys.replacement(bundle), patience)
        except NotFound:
            pass
        raise


async def read_outcome(objects: Objects, name: str, patience: Patience) -> Outcome:
    """Return the outcome in the object `name`. An outcome object that is too large is not fetched.

    Raise NotFound if the object does not exist. Raise Malformed if the object cannot be read or belongs to another
    bundle.
    """
    try:
        data = await patience(lambda: objects.get(name, limit=OUTCOME_WEIGHT))
    except TooLarge as error:
        raise json_format.unreadable(name, error) from error
    return json_format.outcome_from_bytes(data, name)


async def uncommitted(
    objects: Objects, follows: Sequence[Follow], patience: Patience, key: CommitKey
) -> tuple[Follow, ...]:
    """Return the follow-ups without a committed outcome.

    A follow-up with a committed outcome need not be sent again, because a worker has received the message of the
    follow-up.
    """
    object_infos = [await patience(partial(objects.head, object_keys.outcome(f.bundle, key))) for f in follows]
    return tuple(f for f, outcome in zip(follows, object_infos, strict=True) if outcome is None)


@dataclass(frozen=True, slots=True)
class Addressed:
    """A message and the name of its queue."""

    queue: str
    message: Outgoing


def address(
    job: JobDef,
    bundle: Bundle,
    key: CommitKey,
    *,
    items: Sequence[Json] | None = None,
    delay_s: float = 0.0,
    now_s: float,
    watchdog: bool = False,
    trace: str = "",
    reply: str = "",
    copy_s: float | None = None,
    expected_s: Mapping[StageName, float] | None = None,
) -> Addressed:
    """Return the message for `bundle`, with the commit key of its job.

    If the delay exceeds the maximum of SQS, the message's `not_before_s` delays the bundle for the remaining time.
    `trace` is the trace context of the sender if the job is traced. The default of `trace` is the trace context of the
    job's submission. `reply` is the name at which a client waits for the outcome. `copy_s` is the maximum run time of a
    speculative copy. `expected_s` has measured run times (see `TaskMessage`).
    """
    if items is not None and len(json.dumps(items)) > INLINE_BYTES:
        items = None
    not_before_s = now_s + delay_s if delay_s > MAX_DELAY_S else None
    above = trace or job.trace
    message = TaskMessage(bundle, items, not_before_s, watchdog, above, key, reply, copy_s, expected_s or {})
    pool = job.stage(bundle.stage).pool
    return Addressed(object_keys.tasks_queue(pool), Outgoing(task_message(message), min(delay_s, MAX_DELAY_S)))


def follow_ups(
    job: JobDef,
    outcome: Outcome,
    key: CommitKey,
    *,
    now_s: float,
    items: Mapping[int, Json] | None = None,
    trace: str = "",
    expected_s: Mapping[StageName, float] | None = None,
) -> list[Addressed]:
    """Return the messages that follow from `outcome`.

    `items` maps tasks of the bundle to their inputs, as far as the inputs are known. Messages for retries and splits
    contain the known inputs, so workers do not fetch the inputs again. `trace` and `expected_s` have the same meaning
    as in `address`.
    """
    if not outcome.follows:
        return []
    if not settlement.fits(job, outcome.bundle, outcome.follows):
        raise Malformed(f"The outcome of bundle {outcome.bundle.id} does not fit job {job.id}.")
    values = dict(zip(outcome.succeeded, outcome.values, strict=True))

    def inputs(follow: Follow) -> Sequence[Json] | None:
        chained = follow.bundle.stage != outcome.bundle.stage
        known: Mapping[int, Json] = values if chained else (items or {})
        if any(task not in known for task in follow.bundle.tasks):
            return None
        return [known[task] for task in follow.bundle.tasks]

    def delay_s(follow: Follow) -> float:
        if follow.bundle.due_s is None:
            return settlement.delay_s(job, follow)
        # Follow-ups may be sent again long after the commit of their outcome, so compute the remaining wait.
        return min(follow.delay_s, settlement.wait_s(job, follow.bundle, now_s))

    return [
        address(
            job, f.bundle, key, items=inputs(f), delay_s=delay_s(f), now_s=now_s, trace=trace, expected_s=expected_s
        )
        for f in outcome.follows
    ]


def batches(messages: Sequence[Outgoing]) -> list[list[Outgoing]]:
    """Split `messages` into batches of at most 10 messages and 256 KiB, one batch for each call of a queue."""
    calls: list[list[Outgoing]] = []
    size = 0
    for message in messages:
        length = len(message.body.encode())
        if not calls or len(calls[-1]) == MAX_BATCH or size + length > MAX_MESSAGE_BYTES:
            calls.append([])
            size = 0
        calls[-1].append(message)
        size += length
    return calls


def by_queue(messages: Iterable[Addressed]) -> dict[str, list[Outgoing]]:
    """Group messages by queue and keep their order."""
    queues: dict[str, list[Outgoing]] = {}
    for message in messages:
        queues.setdefault(message.queue, []).append(message.message)
    return queues


async def send_to(queue: Queue, name: str, messages: Sequence[Outgoing], patience: Patience) -> None:
    """Send all messages to the queue `name`, in as few calls as the limits of a queue allow."""
    for call in batches(messages):
        await patience(partial(queue.send, name, call))


async def send_all(queue: Queue, messages: Sequence[Addressed], patience: Patience) -> None:
    """Send every message to its queue."""
    for name, outgoing in by_queue(messages).items():
        await send_to(queue, name, outgoing, patience)


@dataclass(frozen=True, slots=True)
class StoredCommand:
    """A command with the ETag of its control object at the time of the read."""

    command: ControlCommand
    etag: str


async def read_if_changed(objects: Objects, job: JobId, etag: str | None) -> StoredCommand | None:
    """Return the command of a job, or None if the ETag of the job's control object is still `etag`.

    Raise NotFound if the control object does not exist, and Malformed if it cannot be read.
    """
    key = object_keys.control(job)
    try:
        changed = await objects.get_if_changed(key, etag, limit=MAX_CONTROL_BYTES)
    except TooLarge as error:
        raise json_format.unreadable(key, error) from error
    return StoredCommand(json_format.control_from_bytes(changed[0]), changed[1]) if changed else None


async def read_stored(objects: Objects, job: JobId, patience: Patience) -> StoredCommand | None:
    """Return the current command with its ETag, or None if the control object does not exist.

    A control object that cannot be read, or that has an unknown command, counts as the command RUN of the first round,
    so every command may replace it.
    """
    key = object_keys.control(job)
    try:
        found = await patience(partial(objects.get_if_changed, key, None, limit=MAX_CONTROL_BYTES))
    except NotFound:
        return None
    except TooLarge:
        # A write may replace the object, and needs its ETag.
        info = await patience(partial(objects.head, key))
        return StoredCommand(ControlCommand(Control.RUN), info.etag) if info else None
    assert found
    data, etag = found
    try:
        return StoredCommand(json_format.control_from_bytes(data), etag)
    except (Malformed, TooNew):
        return StoredCommand(ControlCommand(Control.RUN), etag)


async def read_command(objects: Objects, job: JobId, patience: Patience) -> ControlCommand:
    """Return the command of a job. Raise NotFound if the control object does not exist, and Malformed if it cannot be
    read."""
    key = object_keys.control(job)
    try:
        data = await patience(partial(objects.get, key, limit=MAX_CONTROL_BYTES))
    except TooLarge as error:
        raise json_format.unreadable(key, error) from error
    return json_format.control_from_bytes(data)


async def replace_command(
    objects: Objects, job: JobId, command: ControlCommand, patience: Patience, *, over: StoredCommand | None
) -> bool:
    """Replace the command `over` with `command`, and return whether the write succeeded.

    Return False if the control object has changed since `over` was read. The changed control object may contain a
    cancellation, or `command` itself if the response to an earlier write was lost.
    """
    numbered = replace(command, number=over.command.number + 1 if over else 0)
    put = partial(
        objects.put,
        object_keys.control(job),
        json_format.control_to_bytes(numbered),
        if_absent=over is None,
        if_match=over.etag if over else None,
    )
    try:
        await patience(put)
    except (AlreadyExists, NotFound):
        return False
    return True


async def write_cancellation(
    objects: Objects, job: JobId, command: ControlCommand, patience: Patience
) -> ControlCommand | None:
    """Replace the job's command with a cancellation, unless the job's command belongs to a later round.

    Return the first cancellation of the round, which is in effect. If the bucket has a command of a later round, return
    None without a write.
    """
    while True:
        stored = await read_stored(objects, job, patience)
        if stored and stored.command.round > command.round:
            return None
        if stored and stored.command.control is Control.CANCEL and stored.command.round == command.round:
            return stored.command
        if await replace_command(objects, job, command, patience, over=stored):
            return command


async def repair_command(objects: Objects, job: JobId, control: Control, round: int, patience: Patience) -> None:
    """Write the command `control` of the ledger if the job's control object is missing or cannot be read.

    A command that another manager writes at the same time is not replaced.
    """
    try:
        await read_command(objects, job, patience)
        return
    except (Malformed, NotFound):
        found = await read_stored(objects, job, patience)
    await replace_command(objects, job, ControlCommand(control, round=round), patience, over=found)


async def is_defined(objects: Objects, job: JobId) -> bool:
    """Return whether the bucket has the definition of the job. The definition of a deleted job is only a note."""
    return await _has_note(objects, job) is False


async def is_deleted(objects: Objects, job: JobId) -> bool:
    """Return whether a note has replaced the definition of the job, because a user has deleted the job."""
    return await _has_note(objects, job) is True


async def deletions(objects: Objects) -> AsyncIterator[JobId]:
    """Yield the jobs whose deletion was requested and whose sweep has not ended."""
    async for page in objects.list(object_keys.DELETIONS):
        for info in page:
            yield JobId(info.key.removeprefix(object_keys.DELETIONS).removesuffix(".json"))


async def sweep_time(objects: Objects, job: JobId) -> float | None:
    """Return the time of the sweep of a deleted job, or None if the deletion of the job has not finished."""
    try:
        return json_format.sweep_time(await objects.get(object_keys.deletion(job)))
    except (Malformed, NotFound, TooNew):
        return None


async def _has_note(objects: Objects, job: JobId) -> bool | None:
    """Return whether the object at the key of the job's definition is a note, or None if the object does not exist."""
    try:
        note = await objects.get(object_keys.spec(job), limit=json_format.MAX_NOTE_BYTES)
    except NotFound:
        return None
    except TooLarge:
        return False
    try:
        return json_format.is_deleted(json_format.loads(note))
    except (Malformed, TooNew):
        return False


async def permit_round(objects: Objects, job: JobId, round: int, patience: Patience) -> None:
    """Replace a command of an earlier round with the command RUN, which permits the tasks of the round `round`.

    A command of round `round` or of a later round is not replaced.
    """
    while True:
        stored = await read_stored(objects, job, patience)
        if stored and stored.command.round >= round:
            return
        if await replace_command(objects, job, ControlCommand(Control.RUN, round=round), patience, over=stored):
            return
