"""Object keys and queue names, and the seals in object keys.

Invariants: a key or a queue name is a function of the object that it names, so every writer uses the same name. A seal
or a proof is a function of the commit key and of the text that it authenticates. The manager derives the commit key of
each job from the secret of the grid. A worker receives the commit key of a job with the job's messages. Jobs of release
0.1.0 do not have a commit key, and the keys of their objects do not contain a seal.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NewType

from batchlab.core.model import Bundle, BundleId, JobId, StageName

if TYPE_CHECKING:
    from batchlab.core.job_definition import JobDef

CommitKey = NewType("CommitKey", str)
"""A job's commit key: 128 bits in hexadecimal digits, or UNSEALED."""

UNSEALED = CommitKey("")
"""Value for a job of release 0.1.0, which does not have a commit key."""

_DIGITS = 32


def commit_key(secret: bytes, job: JobId) -> CommitKey:
    """Derive the commit key of a job from the secret of the grid."""
    return CommitKey(_mac(secret, f"commit-key/{job}".encode()))


def digest(key: CommitKey) -> str:
    """Return the SHA-256 of a commit key. The definition of a job contains the SHA-256 of its commit key."""
    return hashlib.sha256(key.encode()).hexdigest()


def opens(key: CommitKey, job: JobDef) -> bool:
    """Return True if `key` is the commit key of the job, or if the job does not have a commit key."""
    return not job.commit_hash or hmac.compare_digest(digest(key), job.commit_hash)


def seal(key: CommitKey, *parts: str) -> str:
    """Return the seal of a name that consists of `parts`. The parts must not contain a slash."""
    return _mac(key.encode(), f"seal/{'/'.join(parts)}".encode())


def summary(text: str) -> bytes:
    """Return the hash of a text. `proof` computes the proof of each job from the hash of the text."""
    return hashlib.sha256(text.encode()).digest()


def proof(key: CommitKey, summary: bytes) -> str:
    """Return the proof that the writer of the text with the hash `summary` has the commit key `key`."""
    return _mac(key.encode(), b"proof/" + summary)


def proves(key: CommitKey, summary: bytes, claimed: str) -> bool:
    """Return whether `claimed` is the proof for the commit key `key` and the text with the hash `summary`."""
    return hmac.compare_digest(proof(key, summary).encode(), claimed.encode())


@lru_cache(maxsize=4096)
def _mac(key: bytes, data: bytes) -> str:
    return hmac.digest(key, data, "sha256").hex()[:_DIGITS]


EVENTS = "events"

_CUT = re.compile(r"^jobs/[^/]+/[^/]+/plan/\d+/cuts/\d+\.json$")
_OUTCOME = re.compile(r"^jobs/[^/]+/[^/]+/outcomes/")
_REPLACEMENT = re.compile(r"^jobs/[^/]+/[^/]+/replaced/[0-9a-f]{2}/[^/]+$")
_BUNDLE = re.compile(
    r"^jobs/([A-Za-z0-9][\w.-]{0,99})/([A-Za-z0-9][\w.-]{0,99})/outcomes/[0-9a-f]{2}"
    r"/((\d{8,13})-(\d{8,13})\.(\d{1,16})\.(\d{1,16}))(?:\.[0-9a-f]{32})?\.json$",
    re.ASCII,
)

_OWNED = re.compile(r"(?:jobs|raw|files|logs|reports)/([A-Za-z0-9][\w.-]{0,99})/", re.ASCII)

_SHARED_VALUE = re.compile(r"code/values/[\w-]{1,100}/[0-9a-f]{64}\.pkl", re.ASCII)

_STARTED = re.compile(r"(.+?-\d+)(?:\.(\d+|withdrawn))?", re.ASCII | re.DOTALL)

MADE = ".batchlab-made"
"""Name of the file that marks a local folder as created by batchlab, such as a grid's home or fetched results.

A folder with the file `.batchlab-made` is never part of a job's code.
"""


def tasks_queue(pool: str) -> str:
    """Return the name of the queue from which a pool's workers receive bundles."""
    return f"tasks-{pool}"


def dead_letters(pool: str) -> str:
    return f"tasks-{pool}-dead"


def job_id(name: str, token: str) -> JobId:
    """Return the id of the job with the name `name` and the client token `token`.

    Repeated submissions of a job with one client token get the same job id.
    """
    return JobId(f"{name}-{hashlib.sha256(f'{name}/{token}'.encode()).hexdigest()[:10]}")


def _spread(name: str) -> str:
    # S3 partitions objects by key prefix, so a hash at the start of the name spreads the outcomes of a stage over
    # several prefixes.
    return hashlib.sha256(name.encode()).hexdigest()[:2]


GRID = "grid/"
"""Prefix of the objects that only the manager writes, and that only the manager reads, except for the leader beat."""

LEADER = "grid/leader.json"
"""Key of the leader beat, which the leading manager renews and workers read."""

COMMIT_SECRET = "grid/commit-secret.json"  # noqa: S105 - the name of the object, not the secret
"""Key of the object with the secret from which the commit keys of all jobs are derived. Workers cannot read the commit
secret.
"""
USE = "grid/use.json"
"""Key of the object with the grid's usage, as AWS would bill it, and with the caps on the grid's cost."""
NOTIFICATIONS = "grid/notifications.json"
"""Key of the object with the pending notifications and the results of finished notifications."""
INSTANCES = "grid/instances.json"
"""Key of the object with the digests of the access keys of the fleet's instances."""
RECORD = "grid/record.json"
"""Key of the object with the queue depths and fleet sizes that were recorded while jobs ran. Reports use the recorded
depths and sizes.
"""
SHARES = "grid/shares.json"
"""Key of the object with the fair-share policy of the grid."""
SHARE_USE = "grid/share-use.json"
"""Key of the object with the use of each share."""
POOL_IMAGES = "grid/pool-images.json"
"""Key of the object with the container images of the pools, which `job replay-task` reads."""
USERS = "grid/users.json"
"""Key of the object with the users of the grid, their roles, and the serials of their tokens."""
AUDIT = "grid/audit/"
"""Prefix of the keys of audit records. Each object has the records of a moment, and is never overwritten."""
_LAST_MS = 10**14 - 1
SCHEDULES = "grid/schedules/"
"""Prefix of the keys of schedules. Each schedule is one object."""
JOBS = "jobs/"
"""Prefix of the keys of the committed objects of all jobs."""
NO_STAGES = frozenset({"spec.json", "control.json"})
"""Names of objects in a job's folder, which are not permitted as names of stages."""
WITHDRAWN = "withdrawn"
"""Suffix of the name of a marker that withdraws a start of a suspect (a bundle that may contain a poison task)."""


DELETIONS = "grid/deletions/"
"""Prefix of the keys of requests to delete jobs. An object exists from a user's request to the end of the deletion."""


def addresses_of(job: JobId) -> str:
    """Return the prefix of the keys of a job's webhook addresses."""
    return f"grid/addresses/{job}/"


def addresses(job: JobId, digest: str) -> str:
    """Return the key of the object with a job's webhook addresses. `digest` is the digest of the object's content."""
    return f"{addresses_of(job)}{digest}.json"


def deletion(job: JobId) -> str:
    """Return the key of the request to delete a job."""
    return f"{DELETIONS}{job}.json"


def reference_key(job: JobId) -> str:
    """Return the key of the object with the usage of a job that has ended."""
    return f"grid/used/{job}.json"


def reports(job: JobId) -> str:
    return f"reports/{job}/"


def schedule(name: str) -> str:
    """Return the key of the object with a schedule and its runs. Writes to a schedule's object are conditional on its
    ETag.
    """
    return f"{SCHEDULES}{name}.json"


def audit(at_s: float, name: str, corrects: str = "") -> str:
    """Return the key of the audit records of a moment. The keys of later moments sort first.

    If the records correct the records of the object `corrects`, the key sorts directly before the key of this object.
    """
    moment = corrects.removesuffix(".json") or f"{_LAST_MS - round(at_s * 1000):014d}"
    return f"{AUDIT}{moment}-{name}.json"


def corrected_audit(name: str) -> str:
    """Return the name of the object whose audit records the object `name` corrects, or ""."""
    moment, _, last = name.rpartition("-")
    return f"{moment}.json" if last and "-" in moment else ""


def audit_time(key: str) -> float:
    """Return the time in the key of audit records in epoch seconds. Raise ValueError for another key."""
    return (_LAST_MS - int(key.removeprefix(AUDIT)[:14])) / 1000


def template(digest: str) -> str:
    """Return the key of the definition of the job that a schedule runs. `digest` is the digest of the definition."""
    return f"grid/templates/{digest}.json"


def committed(job: JobId) -> str:
    """Return the prefix of the keys of all committed objects of a job."""
    return f"{JOBS}{job}/"


def spec(job: JobId) -> str:
    """Return the key whose PUT commits a job's definition."""
    return f"jobs/{job}/spec.json"


def control(job: JobId) -> str:
    return f"jobs/{job}/control.json"


def code(digest: str) -> str:
    """Return the key of a zip of code. `digest` is the digest of the zip."""
    return f"code/{digest}.zip"


def pickled(data: bytes) -> str:
    """Return the key of a pickled function, whose name is the digest of its content."""
    return f"code/{hashlib.sha256(data).hexdigest()}.pkl"


def shared_value(owner: str, digest: str) -> str:
    """Return the key of a pickled shared value.

    `owner` is the program that stores and deletes the value, and `digest` is the digest of the content.
    """
    return f"code/values/{owner}/{digest}.pkl"


def is_shared_value(key: str) -> bool:
    """Return whether the key is the key of a pickled shared value."""
    return _SHARED_VALUE.fullmatch(key) is not None


def raw(job: JobId) -> str:
    return f"raw/{job}/"


def retries(job: JobId) -> str:
    return f"jobs/{job}/retries/"


def retry(job: JobId, round: int) -> str:
    """Return the key whose PUT commits the user's `round`-th retry, or the deletion of the job."""
    return f"{retries(job)}{round:04d}.json"


def final(job: JobId, round: int) -> str:
    """Return the key whose PUT commits the job's end in round `round`."""
    return f"jobs/{job}/final/{round:04d}.json"


def manifest(job: JobId, stage: StageName, round: int) -> str:
    """Return the key whose PUT commits a stage's plan: its number of tasks and their inputs."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/manifest.json"


def name_digest(data: bytes) -> str:
    """Return the name of an object whose name is a digest of its content."""
    return hashlib.sha256(data).hexdigest()[:32]


def part(job: JobId, stage: StageName, round: int, name: str) -> str:
    """Return the key of one part of a stage's plan. `name` is the digest of the part's content.

    Because the name is a digest, a planner that was paused cannot replace a part of another planner's plan.
    """
    return f"jobs/{job}/{stage}/plan/{round:04d}/part-{name}.json"


def old_part(number: int) -> str:
    """Return the name of a part in a plan of release 0.1.0, which numbered its parts."""
    return f"{number:06d}"


def item(job: JobId, stage: StageName, round: int, name: str) -> str:
    """Return the key of an input that is too large for a part of a plan. `name` is the digest of the input."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/item-{name}.json"


def mended_part(job: JobId, stage: StageName, name: str) -> str:
    """Return the key of the mended input of a task. `name` is the digest of the object's content.

    Workers may read this key, because it has the form of a part of a plan, and only a manager may write it.
    """
    return f"jobs/{job}/{stage}/plan/mended/part-{name}.json"


def mended_file(job: JobId, stage: StageName, sha256: str) -> str:
    """Return the key of the content of a file that is the mended input of a task."""
    return f"jobs/{job}/{stage}/plan/mended/item-{sha256}"


def cut(job: JobId, stage: StageName, round: int, seq: int) -> str:
    """Return the key whose PUT commits cut number `seq` of a stage."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/cuts/{seq:08d}.json"


def outcomes(job: JobId, stage: StageName) -> str:
    return f"jobs/{job}/{stage}/outcomes/"


def outcome_of(job: JobId, stage: StageName, bundle: BundleId, key: CommitKey) -> str:
    """Return the key of a bundle's outcome. The key of an outcome cannot be derived without the job's commit key."""
    sealed = f".{seal(key, 'outcome', stage, bundle)}" if key else ""
    return f"{outcomes(job, stage)}{_spread(bundle)}/{bundle}{sealed}.json"


def outcome(bundle: Bundle, key: CommitKey) -> str:
    """Return the key whose conditional PUT commits the outcome of a bundle."""
    return outcome_of(bundle.job, bundle.stage, bundle.id, key)


def replacement(bundle: Bundle) -> str:
    """Return the key of the outcome that replaces an unreadable object at `outcome(bundle)`.

    Only a manager writes the replacement of an outcome.
    """
    return f"jobs/{bundle.job}/{bundle.stage}/replaced/{_spread(bundle.id)}/{bundle.id}.json"


def is_replacement(key: str) -> bool:
    return _REPLACEMENT.match(key) is not None


def _execution(kind: str, bundle: Bundle, execution: str, key: CommitKey) -> str:
    # Logs and start markers are written once. The seal prevents a worker without the commit key from being the first to
    # write an object with the key.
    sealed = f".{seal(key, kind, bundle.stage, bundle.id, execution)}" if key else ""
    return f"{bundle.job}/{bundle.stage}/{_spread(bundle.id)}/{bundle.id}/{execution}{sealed}"


def files(bundle: Bundle, execution: str, key: CommitKey) -> str:
    """Return the prefix of the keys of the files that one execution writes.

    Each execution has a prefix of its own for its files.
    """
    return f"files/{_execution('files', bundle, execution, key)}/"


def log(bundle: Bundle, execution: str, key: CommitKey) -> str:
    """Return the key of the log of one execution."""
    return f"logs/{_execution('log', bundle, execution, key)}.log"


def environment(worker: str) -> str:
    """Return the key of the description of a worker's environment.

    A job's name never begins with a dot, so the key is not in a job's folder.
    """
    return f"logs/.workers/{worker}.json"


def tails(job: JobId) -> str:
    """Return the prefix of the keys of a job's live logs."""
    return f"logs/{job}/.tails/"


def tail(job: JobId, worker: str) -> str:
    """Return the key of the object with the live logs of all tasks of a job that one worker runs."""
    return f"{tails(job)}{worker}.json"


def logs(job: JobId) -> str:
    return f"logs/{job}/"


def is_cut(key: str) -> bool:
    return _CUT.match(key) is not None


def is_outcome(key: str) -> bool:
    return _OUTCOME.match(key) is not None


@dataclass(frozen=True, slots=True)
class OutcomeKey:
    """Parts of an outcome's key."""

    job: JobId
    stage: StageName
    bundle: BundleId
    first: int
    last: int
    round: int
    attempt: int


def is_outcome_of(name: str, bundle: Bundle) -> bool:
    """Return whether `name` is the key of an outcome of `bundle`, with any seal, or the key of a replacement of the
    outcome.
    """
    key = outcome_key(name)
    if key is None:
        return name == replacement(bundle)
    return (key.job, key.stage, key.bundle) == (bundle.job, bundle.stage, bundle.id)


def outcome_key(key: str) -> OutcomeKey | None:
    """Return the parts of an outcome's key, with or without a seal, or None if `key` is not the key of an outcome."""
    match = _BUNDLE.match(key)
    if match is None:
        return None
    job, stage, bundle, *numbers = match.groups()
    return OutcomeKey(JobId(job), StageName(stage), BundleId(bundle), *map(int, numbers))


def is_genuine(name: str, key: CommitKey) -> bool:
    """Return whether `name` is the key of an outcome with the seal of the commit key `key`."""
    parts = outcome_key(name)
    return parts is not None and outcome_of(parts.job, parts.stage, parts.bundle, key) == name


def everything_of(job: JobId) -> tuple[str, ...]:
    """Return the prefixes of all objects of a job except the job's code, which other jobs may share.

    Objects that tasks write have prefixes other than jobs/, because a rebuild lists committed objects only, and S3's
    lifecycle rules and policies match prefixes only.
    """
    return tuple(f"{prefix}{job}/" for prefix in _PREFIXES)


_PREFIXES = (JOBS, "raw/", "files/", "logs/", "reports/")
"""Prefixes of the keys of objects that belong to a job. The job's id follows."""


def spans_jobs(keys: Iterable[str]) -> bool:
    """Return whether an input with the keys `keys` may have objects of any job. A key that ends in "/" is a prefix."""
    return any(key in _PREFIXES for key in keys)


def reads(keys: Iterable[str], job: JobId) -> bool:
    """Return whether an input with the keys `keys` has objects of the job. A key that ends in "/" is a prefix."""
    prefixes = everything_of(job)
    return any(
        key.startswith(prefixes) or (key.endswith("/") and any(prefix.startswith(key) for prefix in prefixes))
        for key in keys
    )


def owners(keys: Iterable[str]) -> set[JobId]:
    """Return the jobs to which the objects of an input with the keys `keys` belong."""
    return {JobId(match[1]) for key in keys if (match := _OWNED.match(key))}


def starts(bundle: Bundle) -> str:
    """Return the prefix of the keys of a suspect's start markers. A worker writes one start marker whenever it starts a
    suspect.
    """
    return f"jobs/{bundle.job}/{bundle.stage}/starts/{bundle.id}/"


def start(bundle: Bundle, execution: str, key: CommitKey, then: str = "") -> str:
    """Return the key of the start marker that an execution writes when it starts a suspect.

    `then` is "", the number of a renewal of the start marker, or WITHDRAWN. Start markers are never overwritten or
    deleted.
    """
    label = f"{execution}.{then}" if then else execution
    sealed = f".{seal(key, 'start', bundle.stage, bundle.id, label)}" if key else ""
    return f"{starts(bundle)}{label}{sealed}"


def started_by(bundle: Bundle, name: str, key: CommitKey) -> tuple[str, str] | None:
    """Return the execution in the name of a start marker, and the suffix `then` of the name (see `start`).

    Return None if the seal in `name` is wrong.
    """
    label = name.removeprefix(starts(bundle))
    if key:
        label = label.rpartition(".")[0]
    match = _STARTED.fullmatch(label)
    return (match[1], match[2] or "") if match and start(bundle, label, key) == name else None


def running(bundle: Bundle, key: CommitKey) -> str:
    """Return the key of a marker that shows that a handed-over bundle is still running.

    The worker that runs the bundle renews the marker.
    """
    sealed = f".{seal(key, 'running', bundle.stage, bundle.id)}" if key else ""
    return f"jobs/{bundle.job}/{bundle.stage}/running/{bundle.id}{sealed}.json"
