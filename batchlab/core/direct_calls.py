"""Direct calls: single calls that a client on the grid's machine commits and sends without the manager.

Invariants: the PUT of the job's definition commits a direct call, as it commits every job. A client sends the message
of a direct call only after this PUT, and only if a worker waits for a message. The worker's reply to the client follows
the commit of the outcome. The manager learns of a direct call from the worker's event, or from the client if the
outcome does not arrive soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchlab.core.atomic_write import of_single_call
from batchlab.core.commit import Addressed, address, committed, outcome_at
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Bundle, Json, Outcome, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, Cut, Objects, Queue
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.protocol.commit_keys import CommitKeys, Opening
from batchlab.core.protocol.object_keys import CommitKey, proof, proves, summary

MAX_REPLY_BYTES = 2_000
"""Maximum size in bytes of an outcome in a reply. The client reads a larger outcome from the bucket."""


@dataclass(frozen=True, slots=True)
class CommittedCall:
    """A direct call whose definition is committed, and the message that starts the call."""

    key: CommitKey
    bundle: Bundle
    message: Addressed


@dataclass(frozen=True, slots=True)
class Caller:
    """Ports with which a client begins direct calls."""

    objects: Objects
    queue: Queue
    keys: CommitKeys
    clock: Clock

    async def commit(self, job: JobDef, items: Sequence[Json], reply: str = "") -> CommittedCall:
        """Commit the definition of a single call.

        The worker replies to `reply`. No call is retried, because the manager repeats the steps of a failed call. Raise
        AlreadyExists if the job exists.
        """
        key = await self.keys.new(job.id)
        sealed = replace(job, commit_hash=object_keys.digest(key))
        (stage,) = job.roots()
        bundle = Bundle(job.id, stage.name, TaskSet.span(0, 1))
        opening = Opening(items, Cut(job.id, stage.name, 0, 0, (bundle,), TaskSet(), 1))
        data = commit_keys.to_bytes(sealed, opening)
        with of_single_call(True):
            await self.objects.put(object_keys.spec(job.id), data, if_absent=True)
        message = address(sealed, bundle, key, items=items, now_s=self.clock.now_s(), reply=reply)
        return CommittedCall(key, bundle, message)

    async def send(self, call: CommittedCall) -> None:
        """Send the message of a committed call."""
        await self.queue.send(call.message.queue, [call.message.message])


def reply_to(outcome: Outcome, key: CommitKey) -> str:
    """Return the reply with a committed outcome after the proof of its sender. The reply does not contain a large
    outcome."""
    text = json_format.outcome_text(outcome)
    if len(text.encode()) > MAX_REPLY_BYTES:
        text = ""
    return f"{proof(key, summary(text))} {text}"


async def outcome_in(reply: str, call: CommittedCall, objects: Objects, patience: Patience) -> Outcome | None:
    """Return the outcome of the call `call` in a reply or in the bucket. Return None for the reply to another call.

    A reply counts only if its sender proves that it has the commit key of the call's job. Raise Malformed for the
    outcome of another bundle.
    """
    claimed, _, text = reply.partition(" ")
    if not proves(call.key, summary(text), claimed):
        return None
    if not text:
        return await committed(objects, call.bundle, patience, call.key)
    return outcome_at(object_keys.outcome(call.bundle, call.key), text.encode(), call.key)
