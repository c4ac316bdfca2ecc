"""What the ledger keeps and is told, as values.

Invariant: frozen; each follows from the bucket alone, so that a rebuilt ledger has equal ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from batchlab.jobdef import JobDef
from batchlab.model import (
    Bundle,
    Completion,
    Control,
    JobId,
    JobState,
    StageCounts,
    StageName,
    TaskSet,
)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job's row. `round` counts the user's retries."""

    job: JobDef
    state: JobState
    reason: str = ""
    control: Control = Control.RUN
    round: int = 0
    ended_s: float | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """A stage's row: its counters, and how far its plan has been cut into bundles.

    `plan_round` is the round whose plan its tasks come from; `cut_seq` numbers the cuts of that
    round, -1 before the first; `left` are the tasks not yet cut.
    """

    counts: StageCounts
    plan_round: int = 0
    cut_seq: int = -1
    left: TaskSet = TaskSet()


@dataclass(frozen=True, slots=True)
class BundleRecord:
    """A bundle's row: planned while `completion` is None. `seq` orders completions as folded."""

    bundle: Bundle
    completion: Completion | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Bundles that a planner committed to, the content of one plan/cuts object."""

    job: JobId
    stage: StageName
    round: int
    seq: int
    bundles: tuple[Bundle, ...]
    left: TaskSet
    planned: int | None = None
    """Set in a stage's first cut: its number of tasks."""
    at_s: float | None = field(default=None, compare=False)
    """When it was decided, for reports; None where the job's submission decided it too."""


@dataclass(frozen=True, slots=True)
class Reopening:
    """What one `job retry` takes back from a stage's counters before it runs again.

    `replan` says that the stage's plan itself is void (a gather), so `planned` is unknown again,
    and that its bundles so far appear in no listing any more.
    """

    stage: StageName
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    replan: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How a round of a job ended; `closed` tasks of each stage never came to be."""

    state: JobState
    reason: str
    ended_s: float
    closed: Mapping[StageName, int]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of a job has come to, as far as the bucket says.

    `planned` are the chained stages whose number of tasks its first cuts say; `casualties` belong
    to the completions, one each.
    """

    reopened: Sequence[Reopening]
    cuts: Sequence[Cut]
    planned: Mapping[StageName, int]
    completions: Sequence[Completion]
    casualties: Sequence[Mapping[StageName, int]]
    ending: Ending | None


@dataclass(frozen=True, slots=True)
class Past:
    """All that the bucket says of a job: `state` is how it began, `rounds` what followed."""

    job: JobDef
    state: JobState
    rounds: Sequence[Round]
    control: Control


@dataclass(frozen=True, slots=True)
class JobRows:
    """A job's row and those of its stages, in order, as of one moment."""

    job: JobRecord
    stages: tuple[StageRecord, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What a write came to: the rows after it, and whether it has changed them."""

    rows: JobRows
    is_new: bool


@dataclass(frozen=True, slots=True)
class Folded:
    """What folding came to: which completions were new, and the rows of their jobs after it.

    The i-th completion, where it was new, has the seq `first_seq` + i; nobody else has any between.
    """

    new: Sequence[bool]
    first_seq: int
    jobs: Mapping[JobId, JobRows]


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as it stands: every renewal adds 1 to `beat`. One that is seen unchanged for as long
    as it lasts has run out, by the watch of whoever sees it; no two clocks have to agree. `beat`
    never starts again, so an owner whose renewal adds more than 1 may not have been the only one.
    """

    owner: str
    beat: int
