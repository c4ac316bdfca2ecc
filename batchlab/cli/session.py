"""The grid that one command works with: brought up if there is none, revived, taken down.

Invariant: what this command has started it ends, however it is left; a grid that was there before
stays as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from batchlab.cli import output
from batchlab.client import Client
from batchlab.errors import BackendError, NotFound, Unreachable, UsageError
from batchlab.home import Home, ManagerRecord

if TYPE_CHECKING:
    from batchlab.backends import Backend
    from batchlab.model import Pool

T = TypeVar("T")

REVIVALS = 3
PATIENCE_S = 20.0
"""How long a manager that runs may fail to answer, or to lead."""


def connect(home: Home) -> Client:
    """A client of the manager that runs in `home`; Unreachable where none does."""
    record = home.record()
    if record is None:
        raise Unreachable(
            f"No grid is up in {home.path}.",
            remedy="Start one with `batchlab grid up`, or name another folder with --home.",
        )
    return Client(record.url, home.token())


class Session:
    """A context manager; `start` first, from any thread."""

    def __init__(
        self, home: Home, backend: Backend, pools: Sequence[Pool] = (), *, keep_up: bool = False
    ) -> None:
        self.home = home
        self.ours = False
        """Whether the manager that runs now is one that we started, and end."""
        self._backend = backend
        self._pools = pools
        self._keep_up = keep_up
        self._client: Client | None = None
        self._revivals = 0

    def start(self) -> None:
        """Take the grid that is up, or bring one up; returns when it can be talked to."""
        from batchlab.services import start_manager

        record = self.home.record()
        if record is None:
            # Set before it is true: from now on there may be something to end.
            self.ours = not self._keep_up
            record = start_manager(
                self.home, self._backend, pools=self._pools, parent=not self._keep_up
            )
        if record.backend != self._backend.name:
            raise UsageError(
                f"The grid in {self.home.path} runs on backend {record.backend}, "
                f"not {self._backend.name}.",
                remedy=f"Say --backend {record.backend}, or name another folder with --home.",
            )
        self._connect(record)

    def _connect(self, record: ManagerRecord) -> None:
        if self._client:
            self._client.close()
        self._client = Client(record.url, self.home.token())

    def call(self, ask: Callable[[Client], T]) -> T:
        """The manager's answer. One that has died is replaced, a few times: the grid's state is
        in its folder, so nothing is lost. Raises what the client raises once that does not help.
        """
        give_up_s = time.monotonic() + PATIENCE_S
        while True:
            assert self._client is not None
            try:
                return ask(self._client)
            except NotFound:
                raise
            except BackendError as error:
                if self.home.record() is None:
                    self._revive(error)
                    give_up_s = time.monotonic() + PATIENCE_S
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

    def _revive(self, error: BackendError) -> None:
        if self._revivals == REVIVALS:
            raise Unreachable(
                f"The manager has ended {REVIVALS + 1} times while the job ran.",
                remedy=f"Its log is {self.home.manager_log}.",
            ) from error
        self._revivals += 1
        output.say("The manager has ended; another one takes over.")
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        from batchlab.services import stop_manager

        if self._client:
            self._client.close()
        if self.ours:
            begun_s = time.monotonic()
            stop_manager(self.home)
            output.say(f"The grid is stopped ({output.span(time.monotonic() - begun_s)}).")
