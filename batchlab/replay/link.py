"""The manager of a grid as a replay talks to it: from an event loop, and through its outages.

Invariant: nothing here starts or ends anybody. A manager that is away is waited for, as long as the
replay says, since its absence may be what the scenario is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from batchlab.client import Client
from batchlab.errors import BackendError, NotFound, Unreachable
from batchlab.home import Home

T = TypeVar("T")

AGAIN_S = 0.25
AT_ONCE = 12
"""Requests under way at the same time."""


class Link:
    """Calls of one home's manager; `close` ends it. A manager that was started anew is found by
    the home's record."""

    def __init__(self, home: Home, *, away_s: float) -> None:
        """`away_s` is how long one call waits for a manager that does not answer."""
        self._home = home
        self._away_s = away_s
        self.unanswered = 0
        """How often a manager that did not answer was asked again, by whichever call."""
        self._client: Client | None = None
        # Threads of its own: those that wait for an answer must not keep whoever breaks things,
        # and mends them, from going on.
        self._threads = ThreadPoolExecutor(AT_ONCE, "replay")

    async def call(self, ask: Callable[[Client], T], *, within_s: float | None = None) -> T:
        """The manager's answer. Unreachable or BackendError once it has been away for too long,
        and at once what it refuses (NotFound, Refused, UsageError)."""
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + (self._away_s if within_s is None else within_s)
        while True:
            try:
                return await loop.run_in_executor(self._threads, self._asked, ask)
            except NotFound:
                raise
            except BackendError:
                if loop.time() > give_up_s:
                    raise
            self.unanswered += 1
            await asyncio.sleep(AGAIN_S)

    async def glance(self, ask: Callable[[Client], T]) -> T | None:
        """The manager's answer, None where it does not give one now."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._asked, ask)
        except BackendError:
            return None

    def _asked(self, ask: Callable[[Client], T]) -> T:
        record = self._home.record()
        if record is None:
            raise Unreachable(
                f"The manager of the grid in {self._home.path} has ended.",
                remedy=f"Its log is {self._home.manager_log}.",
            )
        client = self._client
        if client is None or client.url != record.url:
            self._let_go()
            client = self._client = Client.of(self._home, record)
        return ask(client)

    def close(self) -> None:
        """Nobody calls any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._client:
            self._client.close()
        self._client = None
