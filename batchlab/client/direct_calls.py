"""Direct calls of the Python API to a worker on the same machine (see `core.direct_calls`).

Invariant: a direct call that fails at any step becomes a normal submission, which completes the steps that are missing.
A link makes one direct call at a time, and the other calls of the same time go to the manager.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from batchlab.client import thread_cache
from batchlab.client.requests import TRACE_VARIABLE
from batchlab.core.commit import read_outcome
from batchlab.core.direct_calls import Caller, read_reply
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import Json, Outcome
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock, DirectQueue, Objects, ReplyInbox
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home

log = logging.getLogger(__name__)

REPLY_S = 0.02
"""Time in seconds for which a client waits for the reply of a worker before the client submits the job."""


@dataclass(frozen=True, slots=True)
class _Line:
    """Ports of direct calls, and the event loop that uses them."""

    loop: asyncio.AbstractEventLoop
    queue: DirectQueue
    caller: Caller
    inbox: ReplyInbox


class DirectCalls:
    """Direct calls of one link. All methods are thread-safe."""

    def __init__(self, backend: Backend, home: Home, objects: Objects, clock: Clock, patience: Patience) -> None:
        self._backend = backend
        self._home = home
        self._objects = objects
        self._clock = clock
        self._patience = patience
        self._lock = threading.Lock()
        """Lock of the thread that uses the line."""
        self._line: _Line | None = None
        self._is_opening = False
        self._closed = False

    def call(self, job: JobDef, items: Sequence[Json]) -> tuple[bool, Outcome | None]:
        """Begin a single call if a worker waits for a message, and wait a moment for its outcome.

        Return whether the message of the call was sent, and the committed outcome if the worker has replied.
        """
        if not self._lock.acquire(blocking=False):
            return False, None
        try:
            if self._line is None:
                self._open_later()
                return False, None
            return self._line.loop.run_until_complete(self._call(self._line, job, items))
        finally:
            self._lock.release()

    async def _call(self, line: _Line, job: JobDef, items: Sequence[Json]) -> tuple[bool, Outcome | None]:
        is_sent = False
        try:
            (stage,) = job.stages
            if not line.queue.is_awaited(object_keys.tasks_queue(stage.pool)):
                return False, None
            key, message = await line.caller.commit(job, items, line.inbox.name)
            await line.caller.send(message)
            is_sent = True
            end_s = line.loop.time() + REPLY_S
            while (left_s := end_s - line.loop.time()) > 0:
                for body in await line.inbox.receive(left_s):
                    reply = read_reply(body, job.id, key)
                    if isinstance(reply, str):
                        return True, await read_outcome(self._objects, reply, self._patience)
                    if reply:
                        return True, reply
        except BackendError as error:
            log.info("a call goes to the manager: %s", error, extra={"job": job.id})
        return is_sent, None

    def _open_later(self) -> None:
        """Open the line on another thread, because the import of the queue's client may be slow."""
        if self._is_opening or self._closed or os.environ.get(TRACE_VARIABLE):
            return
        self._is_opening = True
        thread_cache.run(self._open)

    def _open(self) -> None:
        try:
            queue = self._backend.open_direct_queue(self._home, self._clock)
            if queue is None:
                return
            caller = Caller(self._objects, queue, CommitKeys(self._objects), self._clock)
            line = _Line(asyncio.new_event_loop(), queue, caller, self._backend.open_inbox(self._home))
        except (BackendError, OSError) as error:
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
    line.inbox.close()
    line.loop.run_until_complete(line.queue.close())
    line.loop.close()
