"""Direct calls of the Python API to a worker on the same machine (see `core.direct_calls`).

Invariant: a direct call that fails at any step becomes a normal submission, which completes the steps that are missing.
A link makes one direct call at a time, and the other calls of the same time go to the manager.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from batchlab.client import thread_cache
from batchlab.client.requests import TRACE_VARIABLE
from batchlab.core.direct_calls import Caller, CommittedCall, outcome_in
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Json, Outcome
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, DirectQueue, LocalFiles, Objects, ReplyInbox
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

log = logging.getLogger(__name__)

REPLY_S = 0.02
"""Time in seconds for which a client waits for the reply of a worker before the client submits the job."""


@dataclass(slots=True)
class _Line:
    """Ports of direct calls, and the event loop that uses them.

    `inbox` is None after a call whose outcome did not arrive in time.
    """

    loop: asyncio.AbstractEventLoop
    queue: DirectQueue
    caller: Caller
    inbox: ReplyInbox | None = None


class DirectCalls:
    """Direct calls of one link. All methods are thread-safe."""

    def __init__(
        self, backend: Backend, home: Home, objects: Objects, files: LocalFiles | None, clock: Clock, patience: Patience
    ) -> None:
        self._backend = backend
        self._files = files
        self._home = home
        self._objects = objects
        self._clock = clock
        self._patience = patience
        self._lock = threading.Lock()
        """Lock of the thread that uses the line."""
        self._line: _Line | None = None
        self._is_opening = False
        self._closed = False

    def call(self, job: JobDef, items: Sequence[Json], sent: Callable[[], None]) -> tuple[bool, Outcome | None]:
        """Begin a single call if a worker waits for a message, and wait a moment for its outcome.

        `sent` is called after the message of the call was sent. Return whether the message was sent, and the committed
        outcome if the worker has replied.
        """
        if not self._lock.acquire(blocking=False):
            return False, None
        try:
            if self._line is None:
                return False, None
            return self._line.loop.run_until_complete(self._call(self._line, job, items, sent))
        finally:
            self._lock.release()

    async def _call(
        self, line: _Line, job: JobDef, items: Sequence[Json], sent: Callable[[], None]
    ) -> tuple[bool, Outcome | None]:
        is_sent = False
        try:
            (stage,) = job.stages
            if not line.queue.is_awaited(object_keys.tasks_queue(stage.pool)):
                return False, None
            inbox = line.inbox = line.inbox or self._backend.open_inbox(self._home)
            call = await line.caller.commit(job, items, inbox.name)
            await line.caller.send(call)
            is_sent = True
            sent()
            if self._files:
                # The creation of the outcome's folders takes about 0.4 ms on a disk. The client creates the folders
                # while the worker receives the message and runs the task.
                self._files.make_folder(object_keys.outcome(call.bundle, call.key))
            end_s = line.loop.time() + REPLY_S
            while (left_s := end_s - line.loop.time()) > 0:
                if outcome := await self._outcome_in(await inbox.receive(left_s), call):
                    return True, outcome
            # A worker whose reply finds no inbox sends its event at once, for which the client waits next.
            line.inbox = None
            return True, await self._outcome_in(inbox.close(), call)
        except (BackendError, OSError) as error:
            log.info("a call goes to the manager: %s", error, extra={"job": job.id})
        return is_sent, None

    async def _outcome_in(self, replies: Sequence[str], call: CommittedCall) -> Outcome | None:
        """Return the outcome of the call, which may be in one of the replies."""
        for reply in replies:
            if outcome := await outcome_in(reply, call, self._objects, self._patience):
                return outcome
        return None

    def open(self) -> None:
        """Open the line on another thread, because the import of the queue's client may be slow. Earlier calls go to
        the manager."""
        if self._is_opening or self._closed or os.environ.get(TRACE_VARIABLE):
            return
        self._is_opening = True
        with suppress(RuntimeError):  # Without a thread, all calls go to the manager.
            thread_cache.run(self._open)

    def _open(self) -> None:
        try:
            queue = self._backend.open_direct_queue(self._home, self._clock)
            if queue is None:
                return
            caller = Caller(self._objects, queue, CommitKeys(self._objects), self._clock)
            line = _Line(asyncio.new_event_loop(), queue, caller)
        except BackendError as error:
            log.info("calls go to the manager: %s", error)
            return
        with self._lock:
            if self._closed:
                _close(line)
            else:
                self._line = line

    def close(self) -> None:
        """Close the ports. Later calls go to the manager."""
        with self._lock:
            self._closed = True
            line, self._line = self._line, None
        if line:
            _close(line)


def _close(line: _Line) -> None:
    if line.inbox:
        line.inbox.close()
    if not thread_cache.is_exiting():
        # The queue closes on a thread, and no thread can be started while Python exits. The event loop runs on another
        # thread, because the calling thread may run an event loop already, as in a notebook.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(line.loop.run_until_complete, line.queue.close()).result()
    line.loop.close()
