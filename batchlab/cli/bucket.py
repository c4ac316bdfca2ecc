"""The bucket that a task is in which a command line names, and its stage.

Invariant: where a grid is up its manager says which job is meant; where none is, the bucket is read
without one, as far as it is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from batchlab.cli import completion
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.core.model import StageName
    from batchlab.core.ports import Objects
    from batchlab.core.retry import Patience
    from batchlab.runtime.factory import Backend
    from batchlab.runtime.home import Home

T = TypeVar("T")

TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A task, such as parse/3, or 3 alone where the job has one stage.",
        show_default=False,
    ),
]
AnyBackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Where the grid lives, where none is up in the folder; 'local' unless said.",
        autocompletion=completion.backends,
        show_default=False,
    ),
]

PATIENCE_S = 5.0
"""How long a bucket may fail to answer somebody who waits for it."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Bucket:
    """Where a job's objects are. `job` is its whole id."""

    home: Home
    backend: Backend
    job: str

    @property
    def patience(self) -> Patience:
        import random

        from batchlab.core.retry import Patience

        return Patience(random.Random(), limit_s=PATIENCE_S)  # noqa: S311 - jitter, not a secret

    def read(self, call: Callable[[Objects, Patience], Coroutine[Any, Any, T]]) -> T:
        """What `call` comes to, given the bucket and some patience."""
        import asyncio

        objects = self.backend.open_bucket(self.home)
        return asyncio.run(call(objects, self.patience))


def find(home: Home, backend: str | None, job: str) -> Bucket:
    """The bucket that a job is in, by the manager that runs in `home`, or where none does by the
    whole id. UsageError."""
    from batchlab.cli.session import connect, resolve
    from batchlab.runtime import factory

    if record := home.record():
        remedy = "Leave out --backend, or name another folder with --home."
        home.check_backend(record, backend or record.backend, remedy)
        with connect(home) as client:
            return Bucket(home, factory.load(record.backend), resolve(client, job)["id"])
    loaded = factory.load(backend or "local")
    if loaded.capabilities.simulated:
        raise UsageError(
            "The simulator keeps no tasks.", remedy="Run the job on --backend local first."
        )
    if loaded.capabilities.local_bucket and not home.objects.is_dir():
        raise UsageError(
            f"There is no grid in {home.path}, and never was one.",
            remedy="Name its folder with --home.",
        )
    if job == "last" or not _ID.fullmatch(job):
        raise UsageError(
            f"No grid is up in {home.path}, so nobody knows which job {job!r} is.",
            remedy="Name it by its whole id, or bring the grid up: `batchlab grid up`.",
        )
    return Bucket(home, loaded, job)


def stage_of(bucket: Bucket, stage: str | None) -> StageName:
    """The stage that is named, or the only one there is; UsageError."""
    from batchlab.core.errors import NotFound
    from batchlab.core.model import JobId, StageName
    from batchlab.jobs import attempts

    try:
        job = bucket.read(
            lambda objects, patience: attempts.definition(objects, JobId(bucket.job), patience)
        )
    except NotFound as error:
        raise UsageError(
            f"The bucket has no job {bucket.job}: it never had, or its objects have been removed.",
            remedy="Name the job by its whole id, as `batchlab job list` shows it.",
        ) from error
    names = [one.name for one in job.stages]
    if stage is None and len(names) == 1:
        return names[0]
    if stage in names:
        return StageName(stage)
    missing = f"Job {bucket.job} has no stage {stage!r}." if stage else "Which stage is meant?"
    raise UsageError(missing, remedy=f"It has {', '.join(names)}; write {names[0]}/INDEX.")
