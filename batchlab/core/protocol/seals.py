"""Commit keys of jobs, and the seals and proofs that are made with them.

Invariant: a seal or a proof is a function of the commit key and of the text that it covers. The
manager derives the commit key of each job from the secret of the grid. A worker gets it with the
job's messages. Jobs of release 0.1.0 do not have a commit key, and their names do not have a seal.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NewType

from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId

CommitKey = NewType("CommitKey", str)
"""128 bits in hexadecimal digits, or UNSEALED."""

UNSEALED = CommitKey("")
"""Value for a job without a commit key."""

_DIGITS = 32


def commit_key(secret: bytes, job: JobId) -> CommitKey:
    """Derive the commit key of a job from the secret of the grid."""
    return CommitKey(_mac(secret, f"commit-key/{job}".encode()))


def digest(key: CommitKey) -> str:
    """Return the SHA-256 of a commit key, which is part of its job's definition."""
    return hashlib.sha256(key.encode()).hexdigest()


def opens(key: CommitKey, job: JobDef) -> bool:
    """Return whether `key` is the commit key of the job, or the job does not have one."""
    return not job.commit_hash or hmac.compare_digest(digest(key), job.commit_hash)


def seal(key: CommitKey, *parts: str) -> str:
    """Return the seal of a name that consists of `parts`. The parts must not contain a slash."""
    return _mac(key.encode(), f"seal/{'/'.join(parts)}".encode())


def summary(text: str) -> bytes:
    """Return the hash of a text. `proof` uses it to make one proof for each job."""
    return hashlib.sha256(text.encode()).digest()


def proof(key: CommitKey, summary: bytes) -> str:
    """Return the proof that the writer of a text has the commit key."""
    return _mac(key.encode(), b"proof/" + summary)


def proves(key: CommitKey, summary: bytes, given: str) -> bool:
    """Return whether `given` is the proof of a text under this commit key."""
    return hmac.compare_digest(proof(key, summary).encode(), given.encode())


def _mac(key: bytes, data: bytes) -> str:
    return hmac.digest(key, data, "sha256").hex()[:_DIGITS]
