"""The grid that one command works with: brought up if there is none, revived, taken down.

Invariant: a command ends the grid that it started, however the command ends. A grid that stood
before stays up, also if its manager dies meanwhile and the command starts the next one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import urlsplit

from batchlab.cli import output
from batchlab.client.http import Client
from batchlab.client.requests import patience_s
from batchlab.core.errors import BackendError, NotFound, Unreachable, UsageError
from batchlab.runtime.home import Home, ManagerRecord

if TYPE_CHECKING:
    from batchlab.core.api_types import JobView
    from batchlab.core.model import Pool
    from batchlab.runtime.factory import Backend

T = TypeVar("T")

REVIVALS = 3
PAGE = 500
_ID = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{10}")


@contextmanager
def connect(home: Home) -> Iterator[Client]:
    """A client of the manager that runs in `home`; Unreachable where none does. What the manager
    does not know is a name that the user got wrong: UsageError."""
    record = home.record()
    if record is None:
        raise _no_grid(home)
    with Client.of(home, record) as client:
        try:
            yield client
        except NotFound as error:
            raise UsageError(error.message, remedy=error.remedy) from error


def _no_grid(home: Home) -> Unreachable:
    from batchlab.runtime.aws import deployment

    # Without the backend a second grid would come up here, beside the stack that is meant.
    deployed = deployment.path_in(home).exists()
    knows = ", which knows the jobs that ran here" if home.objects.is_dir() else ""
    remedy = (
        "Connect to its stack on AWS with `batchlab grid up --backend aws`; without --backend a "
        "grid starts on this machine."
        if deployed
        else f"Start one with `batchlab grid up`{knows}, or name another folder with --home."
    )
    return Unreachable(f"No grid is up in {home.path}.", remedy=remedy)


def resolve(client: Client, text: str) -> JobView:
    """The job that `text` means: an id, the beginning of one id only, or "last"; UsageError."""
    if text == "last":
        for newest in client.jobs(limit=1):
            return newest
        raise UsageError("There are no jobs.", remedy="`batchlab job submit FILE` makes one.")
    if _ID.fullmatch(text):
        with suppress(NotFound):
            return client.job(text)
    found: list[JobView] = []
    page = client.jobs(limit=PAGE)
    while page:
        found += [one for one in page if one["id"].startswith(text)]
        page = client.jobs(limit=PAGE, before=page[-1]["id"])
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"There is no job {text!r}.", remedy="`batchlab job list` shows those there are."
        )
    ids = ", ".join(one["id"] for one in found[:3])
    raise UsageError(
        f"{text!r} could be any of {len(found)} jobs: {ids}{', …' if len(found) > 3 else ''}.",
        remedy="Write more of the id.",
    )


def steer(client: Client, text: str, verb: Callable[[Client, str], JobView]) -> JobView:
    """What the manager answers of the job that `text` means. It may know of a whole id though its
    listings do not: a job whose work began may be in the bucket alone."""
    if _ID.fullmatch(text):
        with suppress(NotFound):
            return verb(client, text)
    return verb(client, resolve(client, text)["id"])


class Session:
    """A context manager; `start` first, from any thread."""

    def __init__(
        self,
        home: Home,
        backend: Backend,
        pools: Sequence[Pool] = (),
        *,
        keep_up: bool = False,
        port: int = 0,
        revivals: int = REVIVALS,
    ) -> None:
        self.home = home
        self.backend = backend
        self.ours = False
        """Whether the manager that runs now is one that we started, and end."""
        self._stands = keep_up
        """Whether the grid stays up after this command."""
        self.stop_s: float | None = None
        """How long the grid took to end, once it has."""
        self._pools = pools
        self._keep_up = keep_up
        self._port = port
        self._client: Client | None = None
        self._revivals_left = revivals

    @classmethod
    def attached(cls, home: Home) -> Self:
        """To the grid that is up in `home`, which is none of ours; Unreachable where none is."""
        from batchlab.runtime import factory

        record = home.record()
        if record is None:
            raise _no_grid(home)
        session = cls(home, factory.load(record.backend), revivals=0)
        session._connect(record)
        return session

    def start(self) -> None:
        """Take the grid that is up, or bring one up; returns when it can be talked to. Again it
        does nothing."""
        if self._client is not None:
            return
        if self._port and not self.backend.capabilities.local_manager:
            raise UsageError(
                f"On {self.backend.name} the manager has a port of its own.",
                remedy="Leave out --port.",
            )
        self.backend.check_installed()
        record = self.home.record()
        # Containers may stand without a manager for a moment, and hold everybody's objects.
        if self.backend.restarts_manager(self.home) or (record and not record.parent):
            self._stands = True
        self._bring_up()
        if record and self._stands:
            self._pools, self._port = self._as_it_stands()

    def _as_it_stands(self) -> tuple[Sequence[Pool], int]:
        """Return the pools and the port with which another manager continues this grid."""
        from batchlab.core.model import Pool

        if not self.backend.capabilities.local_manager:
            return (), 0  # they are written down where the grid is
        assert self._client is not None
        port = urlsplit(self._client.url).port or 0
        pools = self.call(lambda client: client.grid())["pools"]
        return [Pool(one["name"], one["min"], one["max"], one["slots"]) for one in pools], port

    def _bring_up(self) -> None:
        from batchlab.runtime.manager_process import has_started, start_manager

        self.backend.named_place(self.home)  # refuses another endpoint than this home's
        record = self.home.record()
        if record is None:
            # Set before it is true: from now on there may be something to end.
            self.ours = not self._stands
            output.say(
                f"Connecting to the stack {self.backend.stack(self.home).stack}."
                if self.backend.capabilities.remote_manager
                else f"Starting a grid in {self.home.path}."
            )
            record = start_manager(
                self.home,
                self.backend,
                pools=self._pools,
                parent=not self._stands,
                port=self._port,
                say=output.say,
            )
        # Another command may have been faster.
        self.ours = not self._stands and has_started(self.home, record)
        remedy = f"Say --backend {record.backend}, or name another folder with --home."
        self.home.check_backend(record, self.backend.name, remedy)
        self._connect(record)

    def _connect(self, record: ManagerRecord) -> None:
        if self._client:
            self._client.close()
        self._client = Client.of(self.home, record)

    def call(self, ask: Callable[[Client], T]) -> T:
        """The manager's answer. One that has died is replaced, a few times: the grid's state is
        in its folder, so nothing is lost. Raises what the client raises once that does not help.
        """
        give_up_s = time.monotonic() + patience_s(restarted=self._is_restarted)
        while True:
            assert self._client is not None
            try:
                return ask(self._client)
            except NotFound:
                raise
            except BackendError as error:
                if self.home.record() is None and not self._is_restarted:
                    self._revive(error)
                    give_up_s = time.monotonic() + patience_s()
                elif time.monotonic() > give_up_s:
                    raise
                else:
                    # It has only just started and does not lead yet, or is very busy.
                    time.sleep(0.05)
                    self._reconnect()

    def _reconnect(self) -> None:
        record = self.home.record()
        if record and self._client and record.url != self._client.url:
            self._connect(record)

    @property
    def ends_grid(self) -> bool:
        """Whether the grid goes down with this command."""
        return self.ours and not self.backend.capabilities.remote_manager

    @property
    def _is_restarted(self) -> bool:
        """Whether Docker restarts the manager of a grid that this command did not start."""
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
        # Docker kills a manager in its container; then the deployment is forgotten.
        is_gone = self.backend.capabilities.container_manager or self.home.is_taken_down
        if is_gone and not self._keep_up:
            self._stands = False  # and the rest runs on a grid of this command's own
        self._bring_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        from batchlab.runtime.manager_process import has_started, stop_manager

        if self._client:
            self._client.close()
        if self.ours and has_started(self.home, self.home.record()):
            begun_s = time.monotonic()
            # One that is only just starting ends by itself when we do.
            if stop_manager(self.home):
                if self.backend.capabilities.remote_manager:
                    return  # the grid goes on there
                self.stop_s = time.monotonic() - begun_s
                output.say(f"The grid is stopped ({output.span(self.stop_s)}).")
