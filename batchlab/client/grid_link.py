"""Connection of a program to a grid.

The connection starts the grid if the grid is not up, restarts the grid, and stops the grid. Invariant: a grid that this
process started ends with this process. A grid that was up before the connection stays up. Jobs are canceled when no
caller waits for their results.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from batchlab.client import thread_cache
from batchlab.client.http import Client
from batchlab.client.requests import patience_s
from batchlab.core.errors import BackendError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.model import ENDED, Pool
from batchlab.runtime import factory, manager_process
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord

T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_S = 20.0
RECORD_POLL_S = 0.1
_OURS = "batchlab-grid"
"""Prefix of the names of the event loop's thread and of the threads in the event loop's pool."""
LOOP_TIMEOUT_S = 10.0
"""Time in seconds after which an event loop that does not respond is considered stuck."""
JOB_END_WAIT_S = 3.0
"""Time in seconds that `close` waits until the manager shows the end of jobs."""


class Link:
    """Connection to the manager of `home`, with the thread on which the async ports run."""

    def __init__(self, backend: Backend, home: Home, pools: Sequence[Pool]) -> None:
        """`pools` are the pools of a new grid. Raise UsageError if `pools` is not empty and a grid is already up."""
        self.backend = backend
        self.home = home
        self.clock = backend.open_clock()
        self.ids = backend.open_ids()
        self.patience = factory.patience()
        self.ours = False
        """Whether this process started the grid. `close` stops only a grid that this process started."""
        self._pools = pools
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._clients: list[Client] = []
        """Clients of the manager. The last client in the list is current, but threads may still use earlier clients."""
        self._live: set[str] = set()
        """Jobs for which a caller waits."""
        self._cancelling: dict[Future[None], str] = {}
        """Jobs that the event loop is canceling."""
        self._ending: deque[str] = deque(maxlen=64)
        """Jobs that no caller waits for any more, and that may not have ended yet."""
        self._folder: Path | None = None
        self._connect()
        # The bucket is opened now, because the location of the bucket is known only after a grid has started.
        self.objects = backend.open_objects(home)
        self.files = backend.open_local_files(home)
        self._loop = asyncio.new_event_loop()
        # The event loop's thread is a daemon, because Python would wait for the end of a normal thread before the call
        # of `close` at exit.
        self._loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix=_OURS))
        self._thread = threading.Thread(target=self._loop.run_forever, name=_OURS, daemon=True)
        self._thread.start()

    # --- The manager -----------------------------------------------------------------------------

    def _connect(self) -> None:
        # `named_place` raises UsageError if the home belongs to another endpoint
        self.backend.named_place(self.home)
        record = self.home.record()
        if record is None:
            record = manager_process.start_manager(self.home, self.backend, pools=self._pools, parent=True)
            # Another process may have started the manager at the same time.
            self.ours = self._has_started(record)
        elif self._pools and not self.ours:
            raise UsageError(
                f"A grid is up in {self.home.path}, and the pools of a running grid cannot be set.",
                remedy="Leave out workers, pools, and warm, or name another folder as home.",
            )
        remedy = f'Use Grid("{record.backend}"), or name another folder as home.'
        self.home.check_backend(record, self.backend.name, remedy)
        try:
            self.backend.check_python(self.home)
        except UsageError:
            if self.ours:
                manager_process.stop_manager(self.home)
            raise
        self._clients.append(Client.of(self.home, record))

    def _has_started(self, record: ManagerRecord) -> bool:
        """Return whether this process started the manager process or the manager's container."""
        if self.backend.capabilities.container_manager:
            return manager_process.has_started(self.home, record)
        try:  # the operating system is asked, because a forked process has a copy of its parent's state
            os.waitid(os.P_PID, record.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    @property
    def client(self) -> Client:
        """Return the manager's client. Raise UsageError after `close`."""
        self.check_open()
        return self._clients[-1]

    @property
    def forked(self) -> bool:
        """Return whether the Link object is a copy in a forked child process."""
        return os.getpid() != self._pid

    def check_open(self) -> None:
        """Raise UsageError after `close`."""
        # In a forked child, the event loop's thread does not exist, and a wait for this thread would never end.
        if self._closed or not self._thread.is_alive():
            raise UsageError("This grid is closed in this process.", remedy="Create another Grid.")

    def call(self, request: Callable[[Client], T]) -> T:
        """Return the manager's answer to `request`.

        If the manager of this process has ended, start another manager. The grid's folder contains the state of the
        grid, so a restart of the manager loses nothing.
        """
        give_up_s: float | None = None
        while True:
            client = self.client
            try:
                return request(client)
            except Unreachable as error:
                now_s = self.clock.monotonic_s()
                give_up_s = give_up_s or now_s + patience_s(restarted=self._is_restarted)
                if now_s > give_up_s:
                    raise
                self._reconnect(client, error)

    @property
    def _is_restarted(self) -> bool:
        """Return whether another process, such as Docker, restarts the manager."""
        return not self.ours and self.backend.restarts_manager(self.home)

    def _reconnect(self, client: Client, error: Unreachable) -> None:
        with self._lock:
            if self._closed or client is not self._clients[-1]:
                return
            record = self.home.record()
            if record is None and not self.ours:
                if not self._is_restarted:
                    raise error
                time.sleep(RECORD_POLL_S)
                return
            if record is None or record.url != client.url:
                log.warning("the manager has ended, and another manager replaces it")
                self._connect()
                return
        time.sleep(0.05)  # the manager process runs, but does not answer

    # --- The ports -------------------------------------------------------------------------------

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the event loop's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine.

        An interrupt of the caller cancels the coroutine. Raise UsageError after `close`.
        """
        try:
            self.check_open()
        except UsageError:
            coroutine.close()  # `close` avoids a warning about a coroutine that never ran
            raise
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    @property
    def folder(self) -> Path:
        """Return this process's folder for fetched files. `close` removes the folder for fetched files."""
        if self._folder is None:
            self._folder = self.home.scratch / self.ids.fresh("client")
        return self._folder

    # --- Jobs ------------------------------------------------------------------------------------

    def follow(self, job: str) -> None:
        """Record that a caller waits for the job. `close` cancels the job unless `leave` is called first."""
        self._live.add(job)

    def leave(self, job: str, *, cancel: bool) -> None:
        """Record that no caller waits for the job any longer. With `cancel`, start the cancellation of the job, and
        `close` waits for the end of the cancellation.

        The garbage collector may call `leave`, on any thread and after `close`.
        """
        if job not in self._live or self._closed or not self._thread.is_alive():
            return
        self._live.discard(job)
        self._ending.append(job)
        if cancel:
            cancelling = self.start(asyncio.to_thread(self._cancel, job))
            self._cancelling[cancelling] = job
            cancelling.add_done_callback(self._cancelled)

    def _cancel(self, job: str) -> None:
        try:
            self._clients[-1].cancel(job)
        except (Refused, NotFound):
            return  # an error means that the job has ended or was never submitted
        except BackendError as error:
            log.warning("job %s could not be canceled: %s", job, error)

    def _cancelled(self, cancelling: Future[None]) -> None:
        error = None if cancelling.cancelled() else cancelling.exception()
        if error and thread_cache.is_exiting():
            # While Python exits, no thread can be started, and `close` cancels the job. The job is added to `_live`
            # before its removal from `_cancelling`, so that `close` always finds the job.
            self._live.add(self._cancelling[cancelling])
        elif error:
            log.error("a job could not be canceled", exc_info=error)
        self._cancelling.pop(cancelling, None)

    # --- Closing ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel the remaining jobs, and stop the grid if this process started it.

        Repeated calls of `close` do nothing.
        """
        # A forked child does not close the grid, because the grid belongs to the parent process.
        if self._closed or self.forked:
            return
        if threading.current_thread().name.startswith(_OURS):
            # The grid is closed on another thread, because the last reference may be dropped on a thread of the link,
            # which cannot join itself.
            threading.Thread(target=self.close, name="batchlab-close").start()
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        is_stuck = True
        with ExitStack() as steps:
            if self._folder:
                steps.callback(shutil.rmtree, self._folder, ignore_errors=True)
            steps.callback(lambda: None if is_stuck else self._stop_loop())
            if self.ours:
                steps.callback(self._stop_manager)
            for client in self._clients:
                steps.callback(client.close)
            steps.callback(lambda: self._cancel_remaining(is_stuck))
            # The check of the event loop is not a step, because an interrupt during the check must not skip the steps.
            is_stuck = self._is_stuck()

    def _cancel_remaining(self, is_stuck: bool) -> None:
        cancelling = dict(self._cancelling)
        if not is_stuck:
            wait(cancelling)
        failed = set(cancelling.values())
        if not is_stuck:  # a stuck event loop may hold the lock of a future forever
            failed = {job for future, job in cancelling.items() if not future.cancelled() and future.exception()}
        for job in failed | self._live:
            # The cancellation runs on this thread, because no thread can be started while Python exits.
            self._cancel(job)
            self._ending.append(job)
        if self.ours and self._ending:
            self._wait_for_ends()

    def _is_stuck(self) -> bool:
        """Return whether the event loop is stuck.

        If a thread that waits for a future is interrupted, the lock of the future may stay held. The event loop is
        stuck if it waits for a lock that stays held.
        """
        responded = threading.Event()
        self._loop.call_soon_threadsafe(responded.set)
        if responded.wait(LOOP_TIMEOUT_S):
            return False
        log.warning("the grid's event loop does not respond, so its thread is not ended")
        return True

    def _wait_for_ends(self) -> None:
        """Wait until the manager shows the jobs as ended.

        If the grid stopped before the manager shows the end, the next manager would show finished jobs as running.
        """
        client = self._clients[-1]
        give_up_s = self.clock.monotonic_s() + JOB_END_WAIT_S
        try:
            for view in client.jobs(active=True):
                while (
                    view["id"] in self._ending and view["state"] not in ENDED and self.clock.monotonic_s() < give_up_s
                ):
                    view = client.job(view["id"], version=view["version"], wait_s=JOB_END_WAIT_S)
        except BackendError as error:
            log.warning("the grid is stopped, but its jobs may not have ended: %s", error)

    def _stop_manager(self) -> None:
        record = self.home.record()
        # The record is checked, because the manager of this process may have ended and another process may have started
        # a new manager.
        if record and self._has_started(record):
            manager_process.stop_manager(self.home)

    def _stop_loop(self) -> None:
        async def cancel_tasks() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.start(cancel_tasks()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
