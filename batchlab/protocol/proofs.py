"""Proofs in event messages: that the worker which sent one has the commit keys of its jobs.

Invariant: a proof covers the whole text of its message, so that none can be moved to another one.
The proofs are the first member of the message's object, and the text is the message without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from batchlab.model import JobId
from batchlab.protocol import naming
from batchlab.protocol.messages import Events
from batchlab.protocol.sealing import CommitKey, proof, summary

MOST_PROOFS = 2_000
"""One message cannot speak of more jobs."""
_START = '{"p":{'


def jobs_in(events: Events) -> set[JobId]:
    """Return the jobs that the facts in a message are about."""
    jobs = {one.bundle.job for one in events.completions}
    jobs |= {one.bundle.job for one in events.outcomes}
    jobs |= {held.job for beat in events.beats for held in beat.held}
    jobs |= {one.job for one in events.duplicates}
    jobs |= {job for job, *_ in events.traces}
    named = map(naming.outcome_key, events.committed)
    return jobs | {one.job for one in named if one}


def with_proofs(text: str, jobs: Iterable[JobId], key_of: Callable[[JobId], CommitKey]) -> str:
    """Return the message `text` with a proof for each of these jobs that has a commit key."""
    keys = [(job, key) for job in sorted(jobs) if (key := key_of(job))]
    if not keys:
        return text
    of_text = summary(text)
    proofs = {job: proof(key, of_text) for job, key in keys}
    return f'{{"p":{json.dumps(proofs, separators=(",", ":"))},{text[1:]}'


def split(body: str) -> tuple[str, Mapping[str, str]]:
    """Return the text of a message and its proofs by job; ValueError if they cannot be read."""
    if not body.startswith(_START):
        return body, {}
    end = body.find("}")
    proofs = json.loads(body[len(_START) - 1 : end + 1])
    if len(proofs) > MOST_PROOFS or not all(isinstance(one, str) for one in proofs.values()):
        raise ValueError("its proofs cannot be read")
    if body[end + 1 : end + 2] != ",":
        raise ValueError("it has proofs and nothing else")
    return "{" + body[end + 2 :], proofs
