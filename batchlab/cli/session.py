"""Connections of commands to a grid.

A connection starts, replaces, and stops the grid's manager, and reads the grid's bucket. Invariant: a command stops a
grid that the command started, unless the user keeps the grid up. A grid that was running before the command stays up,
even if the manager dies and the command starts another manager.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from batchlab.cli import output
from batchlab.cli.folder_client import FolderClient, open_folder
from batchlab.cli.option_values import connect, is_whole_id, no_grid, resolve
from batchlab.client.http import Client
from batchlab.client.requests import patience_s
from batchlab.core.api_types import pool_of
from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError
from batchlab.core.model import JobId, Pool, StageName
from batchlab.runtime import factory, manager_process
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord, RemoteHome

if TYPE_CHECKING:
    from batchlab.core.port_retries import Patience
    from batchlab.core.ports import Objects

T = TypeVar("T")

MAX_MANAGER_RESTARTS = 3


class Session:
    """Connection of a command to its grid, as a context manager.

    The caller must call `start` before all other methods. Any thread may call `start`. If the command started the grid,
    the end of the session stops the grid.
    """

    def __init__(
        self,
        home: Home,
        backend: Backend,
        pools: Sequence[Pool] = (),
        *,
        keep_up: bool = False,
        port: int = 0,
        revivals: int = MAX_MANAGER_RESTARTS,
    ) -> None:
        self.home = home
        self.backend = backend
        self.ours = False
        """Whether the session started the running manager. If so, the end of the session stops the manager."""
        self._stands = keep_up
        """Whether the grid stays up after the end of the command."""
        self.stop_s: float | None = None
        """Time in seconds that the stop of the grid took, or None if the session did not stop the grid."""
        self._pools = pools
        self._keep_up = keep_up
        self._port = port
        self._client: Client | None = None
        self._revivals_left = revivals

    @classmethod
    def attach(cls, home: Home, *, reads: bool = False) -> Self:
        """Return a session that is connected to the running grid in `home`. Raise Unreachable if no grid is running.

        With `reads`, a session without a running grid reads the jobs in the grid's folder.
        """
        record = home.record()
        if record is None:
            if not reads or (client := open_folder(home)) is None:
                raise no_grid(home)
            session = cls(home, client.backend, revivals=0)
            session._client = client
            return session
        backend = record.backend
        if isinstance(home, RemoteHome):
            with Client.of(home, record) as remote:
                backend = remote.grid()["backend"]
        session = cls(home, factory.load(backend), revivals=0)
        session._connect(record)
        return session

    def start(self) -> None:
        """Connect to the running grid, or start a grid. If the session is connected, do nothing."""
        if self._client is not None:
            return
        self.home.require_folder()
        if self._port and not self.backend.capabilities.local_manager:
            raise UsageError(f"On {self.backend.name} the manager has a port of its own.", remedy="Leave out --port.")
        self.backend.check_installed()
        record = self.home.record()
        # A grid in containers stays up even without a running manager, because the containers store the objects of all
        # jobs.
        if self.backend.restarts_manager(self.home) or (record and not record.parent):
            self._stands = True
        self._bring_up()
        if record and self._stands:
            self._pools, self._port = self._as_it_stands()

    def _as_it_stands(self) -> tuple[Sequence[Pool], int]:
        """Return the pools and the port that a replacement manager of the grid needs."""
        if not self.backend.capabilities.local_manager:
            return (), 0  # A grid in containers or on AWS stores its pools and its port itself.
        assert self._client is not None
        port = urlsplit(self._client.url).port or 0
        views = self.call(lambda client: client.grid())["pools"]
        return [pool_of(view) for view in views], port

    def _bring_up(self) -> None:

        # `find_place` raises an error if the grid's folder belongs to another endpoint.
        self.backend.find_place(self.home)
        record = self.home.record()
        if record is None:
            # `ours` is set before the manager's start, because an interrupted start may leave a manager process that
            # the session must stop.
            self.ours = not self._stands
            output.say(
                f"Connecting to the stack {self.backend.stack(self.home).stack}."
                if self.backend.capabilities.remote_manager
                else f"Starting a grid in {self.home.path}."
            )
            record = manager_process.start_manager(
                self.home, self.backend, pools=self._pools, parent=not self._stands, port=self._port, say=output.say
            )
        # Another command may have started the running manager at the same time.
        self.ours = not self._stands and manager_process.has_started(self.home, record)
        remedy = f"Say --backend {record.backend}, or name another folder with --home."
        self.home.check_backend(record, self.backend.name, remedy)
        self._connect(record)

    def _connect(self, record: ManagerRecord) -> None:
        if self._client:
            self._client.close()
        self._client = Client.of(self.home, record)

    def call(self, request: Callable[[Client], T]) -> T:
        """Call the manager, and return the result.

        The method retries a failed call for a limited time, because the manager may become reachable. The method
        replaces a dead manager a limited number of times. The replacement of a manager keeps all state, because the
        state of the grid is in the grid's folder.
        """
        if isinstance(self._client, FolderClient):
            return request(self._client)
        give_up_s = time.monotonic() + patience_s(restarted=self._is_restarted)
        while True:
            assert self._client is not None
            try:
                return request(self._client)
            except NotFound:
                raise
            except BackendError as error:
                if self.home.record() is None and not self._is_restarted:
                    self._revive(error)
                    give_up_s = time.monotonic() + patience_s()
                elif time.monotonic() > give_up_s:
                    raise
                else:
                    # Retry, because the manager may still be starting, may not lead yet, or may be very busy.
                    time.sleep(0.05)
                    self._reconnect()

    def _reconnect(self) -> None:
        record = self.home.record()
        if record and self._client and record.url != self._client.url:
            self._connect(record)

    @property
    def ends_grid(self) -> bool:
        """Whether the grid stops at the end of the command."""
        return self.ours and not self.backend.capabilities.remote_manager

    @property
    def _is_restarted(self) -> bool:
        """Whether Docker restarts the grid's manager, and the command did not start the grid."""
        return not self.ours and self.backend.restarts_manager(self.home)

    def _revive(self, error: BackendError) -> None:
        if not self._revivals_left:
            raise Unreachable(
                "The manager has ended, and the job is not finished.",
                remedy=f"Its log is {self.backend.manager_log(self.home)}; nothing is lost, and "
                f"the job goes on once a grid is up in {self.home.path}.",
            ) from error
        self._revivals_left -= 1
        output.say("The manager has ended; nothing is lost, and another one takes over.")
        # After Docker has killed a manager in its container, the grid's folder lacks the record of the deployment.
        is_gone = self.backend.capabilities.container_manager or self.home.is_taken_down
        if is_gone and not self._keep_up:
            self._stands = False  # The job continues on a new grid, which this command starts and stops.
        self._bring_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:

        if self._client:
            self._client.close()
        if self.ours and manager_process.has_started(self.home, self.home.record()):
            begun_s = time.monotonic()
            # A manager that is still starting stops at the end of this process, so only a manager that has started must
            # be stopped.
            if manager_process.stop_manager(self.home):
                if self.backend.capabilities.remote_manager:
                    return  # The grid itself continues to run on AWS.
                self.stop_s = time.monotonic() - begun_s
                output.say(f"The grid is stopped ({output.span(self.stop_s)}).")


BUCKET_PATIENCE_S = 5.0
"""Time in seconds for which failed requests to a bucket are retried while a user waits."""

_BUCKET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Bucket:
    """Bucket of a grid that contains the objects of the job `job`. `job` is a complete id."""

    home: Home
    backend: Backend
    job: str

    @property
    def patience(self) -> Patience:
        from batchlab.core.port_retries import Patience

        return Patience(random.Random(), limit_s=BUCKET_PATIENCE_S)  # noqa: S311 - jitter, not a secret

    def read(self, call: Callable[[Objects, Patience], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine of `call` with the bucket and a retry policy, and return the result."""
        objects = self.backend.open_bucket(self.home)
        return asyncio.run(call(objects, self.patience))


def find_bucket(home: Home, backend: str | None, job: str) -> Bucket:
    """Return the bucket that contains a job. Raise UsageError if the job is unknown, or if the folder does not contain
    a grid.

    A manager or a ledger in the folder accepts a beginning of the job's id, or "last". Without both, `job` must be a
    complete id.
    """

    home.require_folder()
    if record := home.record():
        remedy = "Leave out --backend, or name another folder with --home."
        home.check_backend(record, backend or record.backend, remedy)
        with connect(home) as manager:
            return Bucket(home, factory.load(record.backend), resolve(manager, job)["id"])
    if not is_whole_id(job) and (client := open_folder(home, backend)):
        with client:
            return Bucket(home, client.backend, resolve(client, job)["id"])
    loaded = factory.load(backend or "local")
    if loaded.capabilities.simulated:
        raise UsageError("The simulator keeps no tasks.", remedy="Run the job on --backend local first.")
    if loaded.capabilities.local_bucket and not home.objects.is_dir():
        raise UsageError(f"{home.path} is not the folder of a grid.", remedy="Name the folder of the grid with --home.")
    if job == "last" or not _BUCKET_ID.fullmatch(job):
        raise UsageError(
            f"No grid is up in {home.path}, so the job {job!r} is unknown.",
            remedy="Name it by its whole id, or bring the grid up: `batchlab grid up`.",
        )
    return Bucket(home, loaded, job)


def find_stage(bucket: Bucket, stage: str | None) -> StageName:
    """Return the named stage, or the only stage of the job. Raise UsageError if the stage or the job does not exist."""

    from batchlab.jobs import attempts

    try:
        job = bucket.read(lambda objects, patience: attempts.definition(objects, JobId(bucket.job), patience))
    except NotFound as error:
        raise UsageError(
            f"The bucket does not contain the job {bucket.job}, or its objects have been removed.",
            remedy="Name the job by its whole id, as `batchlab job list` shows it.",
        ) from error
    names = [stage_def.name for stage_def in job.stages]
    if stage is None and len(names) == 1:
        return names[0]
    if stage in names:
        return StageName(stage)
    missing = f"Job {bucket.job} does not have a stage {stage!r}." if stage else "Which stage is meant?"
    raise UsageError(missing, remedy=f"It has {', '.join(names)}; write {names[0]}/INDEX.")
