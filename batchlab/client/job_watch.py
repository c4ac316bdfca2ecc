"""Watch that polls the outcomes of many jobs at the same time, on the event loop of the grid's link.

Invariant: a listener receives each outcome with results once. The last event of a watch is the end of the job, or the
error that ended the watch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from urllib.parse import quote

from batchlab.client.grid_link import POLL_S, Link
from batchlab.client.http import Client
from batchlab.client.requests import PATIENCE_S
from batchlab.client.results import gap_s, outcomes
from batchlab.core.errors import BackendError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.model import ENDED, Outcome

if TYPE_CHECKING:
    import httpx

    from batchlab.core.api_types import JobView, OutcomesView

T = TypeVar("T")

log = logging.getLogger(__name__)

CONNECTIONS = 64
SHORT_POLL_S = 1.0
"""Duration in seconds of a long poll if more jobs are watched than there are connections."""
GAP_S = 0.05
"""Maximum pause in seconds between two polls of a job.

The pause between two polls is short, because a program may need a result for its next call.
"""
HEARTBEATS_S = 1.0
"""Time in seconds after the end of the control lease until the heartbeats of workers have reported every started task.
"""


def import_http() -> None:
    """Import the HTTP client of a watch. The import takes 0.3 s, and would delay the first results of an executor."""
    import httpx  # noqa: F401

    import batchlab.client.signed_http  # noqa: F401


class Listener(Protocol):
    """Receiver of the events of watched jobs. The methods of a listener run on the event loop's thread and must return
    quickly.
    """

    def outcome(self, job: str, outcome: Outcome) -> None: ...
    def on_end(self, job: str, view: JobView) -> None: ...
    def on_loss(self, job: str, error: Exception) -> None:
        """Receive the error that ended the watch of a job. The job itself may still run."""


class JobWatch:
    """Watch of the jobs of one listener. Every thread may call the public methods of a watch."""

    def __init__(self, link: Link, listener: Listener) -> None:
        self._link = link
        self._listener = listener
        self._jobs: dict[str, int | None] = {}
        """Watched jobs, with the seq of the last outcome that the listener has received."""
        self._count = 0
        self._http: httpx.AsyncClient | None = None
        """HTTP client that exists while jobs are watched. The end of the last watched job closes the client."""
        self._url = ""

    def add(self, job: str, after: int | None) -> None:
        """Watch a job for outcomes whose seq is greater than `after`. Raise UsageError if the link is closed."""
        self._link.check_open()
        self._jobs[job] = after
        self._link.start(self._follow(job))

    def drop(self, job: str) -> None:
        """Stop the watch of a job that has ended or is about to end."""
        # The current poll of the job is not canceled, because the manager answers the poll soon. If a request is
        # canceled while it connects, the library anyio leaks a socket.
        self._jobs.pop(job, None)

    def cancel_gracefully(self, job: str) -> None:
        """Wait for the end of the job's started tasks, and then cancel the job."""
        self._link.check_open()
        self._link.start(self._cancel(job)).add_done_callback(_log_bugs)

    # --- Polling ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Keep the HTTP client open inside the `with` block. The end of the last open `with` block closes the HTTP
        client.
        """
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            if not self._count and self._http:
                http, self._http = self._http, None
                await http.aclose()

    async def _follow(self, job: str) -> None:
        try:
            async with self._asking():
                view = await self._pass_on(job)
        except asyncio.CancelledError:  # The event loop is ending.
            self._listener.on_loss(job, Unreachable("The grid was closed.", remedy="Create another Grid."))
            raise
        except Exception as error:  # noqa: BLE001 - any error ends the watch of the job
            self._listener.on_loss(job, error)
        else:
            if view:
                self._listener.on_end(job, view)

    async def _pass_on(self, job: str) -> JobView | None:
        """Pass every outcome of a job to the listener.

        Return the last view of the job when the job has ended, or None after `drop`.
        """
        now_s = self._link.clock.monotonic_s
        began_s = now_s()
        while job in self._jobs:
            page = await self._page(job, POLL_S if self._count <= CONNECTIONS else SHORT_POLL_S)
            answered_s = now_s()
            if page["ended"] and not page["outcomes"]:
                return await self._call(lambda client: client.job(job))
            await self._receive(job, page)
            await asyncio.sleep(max(0.0, answered_s + gap_s(answered_s - began_s, most_s=GAP_S) - now_s()))
        return None

    async def _receive(self, job: str, page: OutcomesView) -> None:
        async for outcome in outcomes(self._link, page["outcomes"]):
            self._listener.outcome(job, outcome)
        if page["outcomes"] and job in self._jobs:
            self._jobs[job] = page["outcomes"][-1]["seq"]

    async def _page(self, job: str, wait_s: float) -> OutcomesView:
        give_up_s = self._link.clock.monotonic_s() + PATIENCE_S
        after = self._jobs.get(job)
        while True:
            try:
                return await self._ask(
                    f"/v1/jobs/{quote(job, safe='')}/outcomes",
                    {"wait_s": wait_s} if after is None else {"wait_s": wait_s, "after": after},
                    lambda client: client.outcomes(job, after=after),
                )
            except Unreachable:
                raise  # The link has already retried the request.
            except BackendError:
                if self._link.clock.monotonic_s() > give_up_s:
                    raise
            await asyncio.sleep(0.5)

    async def _ask(self, path: str, query: dict[str, Any], request: Callable[[Client], T]) -> T:
        """Return the manager's answer to a long poll, without using a thread for the wait.

        After an error, send `request` through the link, which replaces an ended manager and raises batchlab's
        exceptions.
        """
        import httpx

        client = self._link.client
        if self._http is None or self._url != client.url:
            old, self._http, self._url = self._http, client.for_loop(CONNECTIONS), client.url
            if old:
                await old.aclose()
        with suppress(httpx.TransportError):
            response = await self._http.get(path, params=query)
            if response.is_success:
                return cast(T, response.json())
        return await self._call(request)

    async def _call(self, request: Callable[[Client], T]) -> T:
        return await asyncio.to_thread(self._link.call, request)

    # --- Cancellation ----------------------------------------------------------------------------

    async def _cancel(self, job: str) -> None:
        try:
            async with self._asking():
                await self._pause_and_cancel(job)
        except (Refused, NotFound, UsageError):
            return  # The job has ended, or the grid was closed. The close of a grid cancels the job.
        except BackendError as error:
            log.warning("job %s could not be canceled: %s", job, error)

    async def _pause_and_cancel(self, job: str) -> None:
        now_s = self._link.clock.monotonic_s
        view = await self._call(lambda client: client.pause(job))
        # A worker that has read the job's control object just before the pause may start tasks until `safe_s`.
        safe_s = now_s() + self._link.backend.manager.control_lease_s + HEARTBEATS_S
        while view["state"] not in ENDED:
            if now_s() > safe_s and not any(stage["running"] for stage in view["stages"]):
                # The manager answers after the control lease has ended again, and the callers need not wait for this.
                canceling = asyncio.create_task(self._call(lambda client: client.cancel(job)))
                await self._end(job, view)
                await canceling
                return
            await asyncio.sleep(0.05)
            query = {"version": view["version"], "wait_s": min(SHORT_POLL_S / 2, max(0.0, safe_s - now_s()))}
            view = await self._ask(f"/v1/jobs/{quote(job, safe='')}", query, lambda client: client.job(job))

    async def _end(self, job: str, view: JobView) -> None:
        """Report the end of a job whose started tasks have all ended, after their outcomes."""
        while job in self._jobs:
            page = await self._page(job, 0.0)
            if not page["outcomes"]:
                self._listener.on_end(job, view)
                return
            await self._receive(job, page)


def _log_bugs(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()):
        log.error("a job could not be canceled", exc_info=error)
