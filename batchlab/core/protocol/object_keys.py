"""Every object key and queue name, in one place.

Invariant: a name is a function of what it names, so a second writer writes the same name.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from batchlab.core.model import Bundle, BundleId, JobId, StageName
from batchlab.core.protocol.seals import CommitKey, seal

EVENTS = "events"

_CUT = re.compile(r"^jobs/[^/]+/[^/]+/plan/\d+/cuts/\d+\.json$")
_OUTCOME = re.compile(r"^jobs/[^/]+/[^/]+/outcomes/")
_REPLACEMENT = re.compile(r"^jobs/[^/]+/[^/]+/replaced/[0-9a-f]{2}/[^/]+$")
_BUNDLE = re.compile(
    r"^jobs/([A-Za-z0-9][\w.-]{0,99})/([A-Za-z0-9][\w.-]{0,99})/outcomes/[0-9a-f]{2}"
    r"/((\d{8,13})-(\d{8,13})\.(\d{1,16})\.(\d{1,16}))(?:\.[0-9a-f]{32})?\.json$",
    re.ASCII,
)

_STARTED = re.compile(r"(.+?-\d+)(?:\.(\d+|withdrawn))?", re.ASCII | re.DOTALL)

MADE = ".batchlab-made"
"""A file that marks a local folder as batchlab's own (a grid's home, fetched results): wherever it
lies, it is no part of a job's code."""


def tasks_queue(pool: str) -> str:
    """The input queue that a pool's workers pick bundles from."""
    return f"tasks-{pool}"


def dead_letters(pool: str) -> str:
    """Where a pool's messages go after too many receives."""
    return f"tasks-{pool}-dead"


def job_id(name: str, token: str) -> JobId:
    """The job that this client token stands for, however often it is submitted."""
    return JobId(f"{name}-{hashlib.sha256(f'{name}/{token}'.encode()).hexdigest()[:10]}")


def _spread(name: str) -> str:
    # S3 partitions by key prefix; without this a stage's outcomes would all grow one prefix.
    return hashlib.sha256(name.encode()).hexdigest()[:2]


GRID = "grid/"
"""Prefix of what only the manager reads and writes."""

COMMIT_SECRET = "grid/commit-secret.json"  # noqa: S105 - its name, not the secret
"""The secret from which the commit keys of all jobs are derived. Workers cannot read it."""


USE = "grid/use.json"
"""What the grid uses, as AWS would bill it, and the caps on that."""


NOTIFICATIONS = "grid/notifications.json"
"""What is to be told to whom, and what came of what has been."""


def addresses(job: JobId, digest: str) -> str:
    """The webhook addresses of a job, named by their content."""
    return f"grid/addresses/{job}/{digest}.json"


def used(job: JobId) -> str:
    """What a job that has ended has used."""
    return f"grid/used/{job}.json"


INSTANCES = "grid/instances.json"
"""Digests of the keys of the fleet's instances."""


RECORD = "grid/record.json"
"""What the manager has seen of queues and fleet while jobs ran, for their reports."""


def reports(job: JobId) -> str:
    """Prefix of a job's performance data."""
    return f"reports/{job}/"


SCHEDULES = "grid/schedules/"
"""Prefix of the schedules, one object each."""


def schedule(name: str) -> str:
    """A schedule with its runs; whoever changes it names what it was."""
    return f"{SCHEDULES}{name}.json"


def template(digest: str) -> str:
    """The job that a schedule runs, named by its content."""
    return f"grid/templates/{digest}.json"


JOBS = "jobs/"
"""Prefix of all that has been committed, of every job."""


def committed(job: JobId) -> str:
    """Prefix of all that has been committed of a job."""
    return f"{JOBS}{job}/"


NO_STAGES = frozenset({"spec.json", "control.json"})
"""Objects in the folder of a job, below which no key can be."""


def spec(job: JobId) -> str:
    """The commit of a job's definition."""
    return f"jobs/{job}/spec.json"


def control(job: JobId) -> str:
    """The word that a job's workers follow."""
    return f"jobs/{job}/control.json"


def code(digest: str) -> str:
    """A zip of code, named by its content."""
    return f"code/{digest}.zip"


def raw(job: JobId) -> str:
    """Prefix of a job's uploaded raw data."""
    return f"raw/{job}/"


def retry(job: JobId, round: int) -> str:
    """The commit of the user's `round`-th retry."""
    return f"jobs/{job}/retries/{round:04d}.json"


def final(job: JobId, round: int) -> str:
    """The commit of the job's end in that round."""
    return f"jobs/{job}/final/{round:04d}.json"


def manifest(job: JobId, stage: StageName, round: int) -> str:
    """The commit of a stage's plan: how many tasks, and where their inputs are."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/manifest.json"


def digest(data: bytes) -> str:
    """The name of an object that is named by its content."""
    return hashlib.sha256(data).hexdigest()[:32]


def part(job: JobId, stage: StageName, round: int, name: str) -> str:
    """One part of the inputs that a manifest points to, by the digest of its content. A planner
    that has stood still cannot replace a part of another one's plan."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/part-{name}.json"


def old_part(number: int) -> str:
    """The name of a part in the plans of release 0.1.0, which numbered them."""
    return f"{number:06d}"


def item(job: JobId, stage: StageName, round: int, name: str) -> str:
    """An input too large for its part, by the digest of its content."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/item-{name}.json"


def cut(job: JobId, stage: StageName, round: int, seq: int) -> str:
    """The commit of one decision on which tasks travel together."""
    return f"jobs/{job}/{stage}/plan/{round:04d}/cuts/{seq:08d}.json"


def outcomes(job: JobId, stage: StageName) -> str:
    """Prefix of a stage's outcomes."""
    return f"jobs/{job}/{stage}/outcomes/"


def outcome_of(job: JobId, stage: StageName, bundle: BundleId, key: CommitKey) -> str:
    """The key of a bundle's outcome; only a holder of the job's commit key can name it."""
    sealed = f".{seal(key, 'outcome', stage, bundle)}" if key else ""
    return f"{outcomes(job, stage)}{_spread(bundle)}/{bundle}{sealed}.json"


def outcome(bundle: Bundle, key: CommitKey) -> str:
    """The key whose conditional PUT commits this bundle."""
    return outcome_of(bundle.job, bundle.stage, bundle.id, key)


def replacement(bundle: Bundle) -> str:
    """The key of the outcome that counts if the object of `outcome(bundle)` cannot be read. Only a
    manager writes it."""
    return f"jobs/{bundle.job}/{bundle.stage}/replaced/{_spread(bundle.id)}/{bundle.id}.json"


def is_replacement(key: str) -> bool:
    """Whether a replacement is committed by that key."""
    return _REPLACEMENT.match(key) is not None


def _execution(kind: str, bundle: Bundle, execution: str, key: CommitKey) -> str:
    # Sealed, so that no other worker can write the name first: these objects are written once.
    sealed = f".{seal(key, kind, bundle.stage, bundle.id, execution)}" if key else ""
    return f"{bundle.job}/{bundle.stage}/{_spread(bundle.id)}/{bundle.id}/{execution}{sealed}"


def files(bundle: Bundle, execution: str, key: CommitKey) -> str:
    """Prefix of the files of one execution; no other execution writes under it."""
    return f"files/{_execution('files', bundle, execution, key)}/"


def log(bundle: Bundle, execution: str, key: CommitKey) -> str:
    """What the tasks of one execution printed."""
    return f"logs/{_execution('log', bundle, execution, key)}.log"


def environment(worker: str) -> str:
    """What a worker's tasks find around them; no name of a job begins with a dot."""
    return f"logs/.workers/{worker}.json"


def tails(job: JobId) -> str:
    """Prefix of what running tasks have printed so far, stored while somebody asks for it."""
    return f"logs/{job}/.tails/"


def tail(job: JobId, worker: str) -> str:
    """The tails of all tasks of the job that one worker runs."""
    return f"{tails(job)}{worker}.json"


def logs(job: JobId) -> str:
    """Prefix of what a job's tasks have printed."""
    return f"logs/{job}/"


def is_cut(key: str) -> bool:
    """Whether a cut was committed by that key."""
    return _CUT.match(key) is not None


def is_outcome(key: str) -> bool:
    """Whether an outcome was."""
    return _OUTCOME.match(key) is not None


@dataclass(frozen=True, slots=True)
class OutcomeKey:
    """The parts of an outcome's key."""

    job: JobId
    stage: StageName
    bundle: BundleId
    first: int
    last: int
    round: int
    attempt: int


def is_outcome_of(name: str, bundle: Bundle) -> bool:
    """Whether `name` is the key of the outcome of `bundle`, with any seal, or of a replacement."""
    found = outcome_key(name)
    if found is None:
        return name == replacement(bundle)
    return (found.job, found.stage, found.bundle) == (bundle.job, bundle.stage, bundle.id)


def outcome_key(key: str) -> OutcomeKey | None:
    """Parse the key of an outcome, sealed or not; None for any other key."""
    found = _BUNDLE.match(key)
    if found is None:
        return None
    job, stage, bundle, *numbers = found.groups()
    return OutcomeKey(JobId(job), StageName(stage), BundleId(bundle), *map(int, numbers))


def is_genuine(name: str, key: CommitKey) -> bool:
    """Whether `name` is the key of an outcome with the seal that `key` gives."""
    found = outcome_key(name)
    return found is not None and outcome_of(found.job, found.stage, found.bundle, key) == name


def everything_of(job: JobId) -> tuple[str, ...]:
    """The prefixes of all that there is of a job, its code apart: that may be another's too.

    What tasks write is not below jobs/: a rebuild lists what has been committed and nothing else,
    and S3's lifecycle rules and policies know a prefix, but nothing in the middle of a key.
    """
    return (committed(job), raw(job), f"files/{job}/", f"logs/{job}/", reports(job))


def starts(bundle: Bundle) -> str:
    """Prefix of a suspect's start markers, one for each time a worker began it."""
    return f"jobs/{bundle.job}/{bundle.stage}/starts/{bundle.id}/"


WITHDRAWN = "withdrawn"
"""The end of the name of a marker that takes back a start."""


def start(bundle: Bundle, execution: str, key: CommitKey, then: str = "") -> str:
    """Return the key of the marker that this execution has started a suspect. `then` is the number
    of a renewal, or WITHDRAWN. No marker is ever written over or deleted."""
    label = f"{execution}.{then}" if then else execution
    sealed = f".{seal(key, 'start', bundle.stage, bundle.id, label)}" if key else ""
    return f"{starts(bundle)}{label}{sealed}"


def started_by(bundle: Bundle, name: str, key: CommitKey) -> tuple[str, str] | None:
    """Return the execution whose start marker has this name, and what follows it in the name (see
    `start`); None if the seal is wrong."""
    label = name.removeprefix(starts(bundle))
    if key:
        label = label.rpartition(".")[0]
    found = _STARTED.fullmatch(label)
    return (found[1], found[2] or "") if found and start(bundle, label, key) == name else None


def running(bundle: Bundle, key: CommitKey) -> str:
    """The marker that a handed-over bundle still runs, refreshed by its worker."""
    sealed = f".{seal(key, 'running', bundle.stage, bundle.id)}" if key else ""
    return f"jobs/{bundle.job}/{bundle.stage}/running/{bundle.id}{sealed}.json"
