"""Commit keys of a grid's jobs, proofs in messages on the events queue, and the object with a job's definition.

The commit keys of a grid are derived from a secret in the grid's bucket. A proof in a message shows that the worker
that sent the message has the commit key of a job.

Invariants: the secret of a grid is created once, by a conditional PUT. Every program that may read `grid/` of the
bucket can derive all commit keys. Workers must not be permitted to read `grid/`, and receive commit keys with their
messages. A proof covers the whole text of its message, so a proof is not valid for another message. The proofs are the
first member of the message's JSON object. A proof covers all other members of the JSON object.

The object `jobs/<job>/spec.json` contains the definition of a job and an optional opening. One PUT commits the
definition and the opening together.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from batchlab.core.errors import AlreadyExists, BackendError, Malformed, NotFound
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, Json
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Cut, Ids, Objects
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.field_checks import UNREADABLE, list_items
from batchlab.core.protocol.messages import Events
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey, commit_key, digest, opens, proof, summary

MAX_KEYS = 4096
"""Maximum number of commit keys in memory."""


class CommitKeys:
    """Commit keys of one grid. The secret of the grid is read when a commit key is first needed."""

    def __init__(self, objects: Objects, patience: Patience | None = None, ids: Ids | None = None) -> None:
        """Provide the commit keys of the grid with the bucket `objects`. Without `patience`, failed calls of the bucket
        are not retried.

        Only a manager passes `ids`, which permits the creation of a missing secret.
        """
        self._objects = objects
        self._patience = patience or Patience(random.Random(0), limit_s=0.0)  # noqa: S311 - with limit_s=0.0, Patience never waits
        self._ids = ids
        self._secret: bytes | None = None
        self._keys: dict[JobId, CommitKey] = {}

    async def ensure(self) -> bool:
        """Read the secret of the grid, or create the secret if it does not exist. Return whether the secret existed.

        If the secret was deleted from the bucket, write the secret in memory to the bucket.
        """
        existed = True
        try:
            secret = await self._read()
        except NotFound:
            if self._ids is None:
                raise
            existed, secret = False, await self._create(self._ids)
        if secret != self._secret:
            self._secret = secret
            self._keys.clear()
        return existed

    async def _create(self, ids: Ids) -> bytes:
        drawn = "".join(ids.fresh("secret") for _ in range(8))
        secret = self._secret or hashlib.sha256(drawn.encode()).digest()
        doc = json_format.to_bytes({"v": json_format.VERSION, "secret": secret.hex()})
        put = partial(self._objects.put, object_keys.COMMIT_SECRET, doc, if_absent=True)
        try:
            await self._patience(put)
        except AlreadyExists:
            return await self._read()
        return secret

    async def key_of(self, job: JobDef) -> CommitKey:
        """Return the commit key of a job, or UNSEALED for a job without a commit key.

        Raise BackendError if the bucket no longer has the secret that the job was submitted with.
        """
        if not job.commit_hash:
            return UNSEALED
        key = await self.new(job.id)
        if not opens(key, job):
            raise BackendError(
                f"The commit secret of this grid is not the one of job {job.id}.",
                remedy="Restore grid/commit-secret.json in the bucket, or submit the job again.",
            )
        return key

    async def stored(self, job: JobId) -> CommitKey:
        """Return the commit key of a job in the grid's bucket. Raise NotFound if the job does not exist."""
        data = await self._patience(partial(self._objects.get, object_keys.spec(job)))
        return await self.key_of(json_format.job_from_json(json_format.loads(data)))

    async def new(self, job: JobId) -> CommitKey:
        """Return the commit key for a job id. The job may not exist yet."""
        if self._secret is None:
            await self.ensure()
        assert self._secret is not None
        key = self._keys.get(job)
        if key is None:
            key = self._keys[job] = commit_key(self._secret, job)
            while len(self._keys) > MAX_KEYS:
                del self._keys[next(iter(self._keys))]
        return key

    async def seal(self, job: JobDef) -> JobDef:
        """Return the job's definition with the hash of the job's commit key, which the manager requires."""
        return replace(job, commit_hash=digest(await self.new(job.id)))

    async def _read(self) -> bytes:
        get = partial(self._objects.get, object_keys.COMMIT_SECRET)
        try:
            return bytes.fromhex(json_format.loads(await self._patience(get))["secret"])
        except NotFound as error:
            raise NotFound(
                "The bucket has no commit secret, so the outcomes of its jobs cannot be named.",
                remedy="Start the grid's manager, or restore grid/commit-secret.json.",
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(
                "The commit secret in the bucket cannot be read.",
                remedy="Restore grid/commit-secret.json from a backup.",
            ) from error


MAX_PROOFS = 2_000
"""Maximum number of proofs in a message. MAX_PROOFS also limits the number of jobs that a message is about."""
_START = '{"p":{'


def jobs_in(events: Events) -> set[JobId]:
    """Return the ids of the jobs that the events of a message are about."""
    jobs = {completion.bundle.job for completion in events.completions}
    jobs |= {outcome.bundle.job for outcome in events.outcomes}
    jobs |= {held.job for beat in events.beats for held in beat.held}
    jobs |= {duplicate.job for duplicate in events.duplicates}
    jobs |= {job for job, *_ in events.traces}
    named = map(object_keys.outcome_key, events.committed)
    return jobs | {outcome_key.job for outcome_key in named if outcome_key}


def with_proofs(text: str, jobs: Iterable[JobId], key_of: Callable[[JobId], CommitKey]) -> str:
    """Return the message `text` with a proof for each job in `jobs` that has a commit key."""
    keys = [(job, key) for job in sorted(jobs) if (key := key_of(job))]
    if not keys:
        return text
    of_text = summary(text)
    proofs = {job: proof(key, of_text) for job, key in keys}
    return f'{{"p":{json.dumps(proofs, separators=(",", ":"))},{text[1:]}'


def split(body: str) -> tuple[str, Mapping[str, str]]:
    """Return the text of a message and its proofs by job. Raise ValueError if the proofs cannot be read."""
    if not body.startswith(_START):
        return body, {}
    end = body.find("}")
    proofs = json.loads(body[len(_START) - 1 : end + 1])
    if len(proofs) > MAX_PROOFS or not all(isinstance(proof, str) for proof in proofs.values()):
        raise ValueError("its proofs cannot be read")
    if body[end + 1 : end + 2] != ",":
        raise ValueError("it has proofs and nothing else")
    return "{" + body[end + 2 :], proofs


@dataclass(frozen=True, slots=True)
class Opening:
    """Items and first cut of a small job, committed with the same PUT as the job's definition.

    An opening has the encoded items of the root stage, and the first cut of the root stage if the cut is known.
    """

    items: Sequence[Json]
    cut: Cut | None = None


def to_bytes(job: JobDef, opening: Opening | None = None) -> bytes:
    """Return the content of a job's spec object."""
    doc = json_format.job_to_json(job)
    if opening:
        cut = json_format.cut_to_json(opening.cut) if opening.cut else None
        doc["opening"] = {"items": opening.items, "cut": cut}
    return json_format.to_bytes(doc)


def from_json(doc: dict[str, Any]) -> tuple[JobDef, Opening | None]:
    """Return the job and the opening in a spec object.

    Raise TooNew if a later batchlab wrote the spec object, and Malformed if the spec object cannot be read.
    """
    return json_format.job_from_json(doc), opening_in(doc)


def opening_in(doc: dict[str, Any]) -> Opening | None:
    """Return the opening in a spec object, or None if the spec object does not have an opening.

    Raise Malformed if the opening cannot be read.
    """
    opening = doc.get("opening")
    if opening is None:
        return None
    try:
        items = list_items(opening["items"])
        cut = json_format.cut_from_json(opening["cut"]) if opening["cut"] else None
        if cut and (cut.job, cut.round, cut.seq) != (doc["id"], 0, 0):
            raise ValueError("its cut is not the first cut of the job")
        return Opening(items, cut)
    except UNREADABLE as error:
        raise Malformed(f"A job's opening cannot be read: {json_format.brief(error)}.") from error
