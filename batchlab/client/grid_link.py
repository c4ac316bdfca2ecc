"""Connection of a Python program to a grid.

The connection starts a grid if the grid is not up, replaces a manager that has ended, and stops the grid. Invariant: a
grid that this process started ends with the last connection of this process to the grid. A grid that another process
started stays up. A job of `map`, `run`, or an executor is canceled when no caller waits for the job's results.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from batchlab.client import thread_cache
from batchlab.client.direct_calls import DirectCalls
from batchlab.client.http import Client
from batchlab.client.requests import patience_s
from batchlab.core.api_types import pool_of
from batchlab.core.errors import BackendError, BatchlabError, NotFound, Refused, Unreachable, UsageError
from batchlab.core.model import ENDED, Pool
from batchlab.core.operating_system.processes import child_has_exited
from batchlab.runtime import factory, manager_process
from batchlab.runtime.descriptor import pool_option
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, ManagerRecord
from batchlab.runtime.manager_process import ManagerStart

T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_S = 20.0
REPORT_S = 5.0
"""Time in seconds after which a completed direct call is reported to the manager."""
RECORD_POLL_S = 0.1
_OURS = "batchlab-grid"
"""Prefix of the names of the link's threads: the thread of the event loop, and the threads in the event loop's pool."""
LOOP_TIMEOUT_S = 10.0
"""Time in seconds after which an event loop that does not respond is considered stuck."""
JOB_END_WAIT_S = 3.0
"""Maximum time in seconds for which `close` waits until the manager lists canceled jobs as ended."""
_OPEN: WeakSet[Link] = WeakSet()
"""Open links of this process. Several links to a grid that this process started share the grid."""


class Link:
    """Connection to the manager of the grid in `home`, with a thread for the event loop that calls the grid's ports."""

    def __init__(self, backend: Backend, home: Home, pools: Sequence[Pool], start: ManagerStart | None = None) -> None:
        """`pools` are the pools of the grid if the link starts a grid. With `start`, the link waits for the manager
        that the caller has begun to start. Raise UsageError if a grid with other pools is already up.
        """
        self.backend = backend
        self.home = home
        self.clock = backend.open_clock()
        self.ids = backend.open_ids()
        self.patience = factory.patience()
        self.ours = False
        """Whether this process started the manager. `close` stops only a manager that this process started, and only
        if no other open link shares the manager.
        """
        self._pools = pools
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._clients: list[Client] = []
        """Clients of the manager. The last client in the list is current, but threads may still use earlier clients."""
        self._live: set[str] = set()
        """Ids of the jobs for which a caller waits."""
        self._cancelling: dict[Future[None], str] = {}
        """Ids of the jobs that are being canceled, by the future of the cancellation."""
        self._ending: deque[str] = deque(maxlen=64)
        """Ids of jobs that may not have ended yet, and for which no caller waits any longer."""
        self._folder: Path | None = None
        self._temporary: set[str] = set()
        """Keys of the objects that `close` deletes."""
        self._connect(start)
        # The bucket is opened after `_connect`, because the location of the bucket is known only after the grid has
        # started.
        self.objects = backend.open_objects(home)
        self.files = backend.open_local_files(home)
        self.direct_calls = DirectCalls(backend, home, self.objects, self.files, self.clock, self.patience)
        self._unreported: list[str] = []
        """Ids of completed direct calls that were not reported to the manager. The lock protects the list."""
        self._report_lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        # The event loop's thread is a daemon thread. At exit, Python waits for the end of all other threads before
        # `close` is called, and so would wait forever.
        self._loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix=_OURS))
        self._thread = threading.Thread(target=self._loop.run_forever, name=_OURS, daemon=True)
        self._thread.start()
        # At the exit of Python, `close` is called when threads can no longer be started, which the bucket needs.
        thread_cache.run_at_exit(self._delete_temporary)
        _OPEN.add(self)

    # --- Manager ---------------------------------------------------------------------------------

    def _connect(self, start: ManagerStart | None = None) -> None:
        # `find_place` raises UsageError if the home belongs to another endpoint.
        self.backend.find_place(self.home)
        record = None if start else self.home.record()
        is_new = record is None
        if record is None:
            if start:
                record = start.wait()
            else:
                record = manager_process.start_manager(self.home, self.backend, pools=self._pools, parent=True)
            # The manager may belong to another process that started a manager at the same time.
            self.ours = self._has_started(record)
        else:
            self.ours = self.ours or any(link.ours for link in self._others())
        remedy = f'Use Grid("{record.backend}"), or name another folder as home.'
        self.home.check_backend(record, self.backend.name, remedy)
        try:
            self.backend.check_python(self.home)
        except UsageError:
            if self.ours:
                manager_process.stop_manager(self.home)
            raise
        client = Client.of(self.home, record)
        if self._pools and not self._clients and not (is_new and self.ours):
            self._check_pools(client)
        self._clients.append(client)

    def _check_pools(self, client: Client) -> None:
        """Raise UsageError unless the running grid has the pools that the caller has named."""
        running = {pool_option(replace(pool_of(view), image="")) for view in client.grid()["pools"]}
        wanted = {pool_option(pool) for pool in self._pools}
        if running == wanted:
            return
        sizes = ", ".join(sorted(running))
        client.close()
        raise UsageError(
            f"A grid with other pools is up in {self.home.path} ({sizes}), and the pools of a running grid cannot be "
            "set.",
            remedy="Leave out workers, pools, and warm, close that grid, or name another folder as home.",
        )

    def _others(self) -> list[Link]:
        """Return the other open links of this process to the same grid."""
        return [
            link
            for link in list(_OPEN)
            if link is not self and link.home.path == self.home.path and not link._closed and not link.forked
        ]

    def _has_started(self, record: ManagerRecord) -> bool:
        """Return whether this process started the manager process or the manager's container."""
        if self.backend.capabilities.container_manager:
            return manager_process.has_started(self.home, record)
        try:  # Ask the operating system, because a forked process has a copy of the state of its parent process.
            child_has_exited(record.pid)
        except ChildProcessError:
            return False
        return True

    @property
    def client(self) -> Client:
        """Return the current client of the manager. Raise UsageError after `close`."""
        self.check_open()
        return self._clients[-1]

    @property
    def forked(self) -> bool:
        """Return whether this process is a forked child of the process that created the Link object."""
        return os.getpid() != self._pid

    def check_open(self) -> None:
        """Raise UsageError after `close`."""
        # In a forked child process, the event loop's thread does not exist, and a wait for the event loop would never
        # end.
        if self._closed or not self._thread.is_alive():
            raise UsageError("This grid is closed in this process.", remedy="Create another Grid.")

    def call(self, request: Callable[[Client], T]) -> T:
        """Return the manager's answer to `request`.

        If a manager that this process started has ended, start another manager. The state of the grid stays in the
        grid's folder and bucket.
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
        time.sleep(0.05)  # The manager process runs, but does not answer yet.

    # --- Ports -----------------------------------------------------------------------------------

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the event loop's thread, and return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine.

        If the wait for the result is interrupted, the coroutine is canceled. Raise UsageError after `close`.
        """
        try:
            self.check_open()
        except UsageError:
            coroutine.close()  # Avoid Python's warning about a coroutine that never ran.
            raise
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def delete_at_close(self, key: str) -> None:
        """Record that `close` deletes an object of this program."""
        self._temporary.add(key)

    async def delete(self, key: str) -> None:
        """Delete an object that `close` would delete."""
        await self.patience(partial(self.objects.delete, [key]))
        self._temporary.discard(key)

    @property
    def closed(self) -> bool:
        return self._closed or self.forked

    @property
    def folder(self) -> Path:
        """Return the folder for the files that this process fetches. `close` removes the folder."""
        if self._folder is None:
            self._folder = self.home.scratch / self.ids.fresh("client")
        return self._folder

    # --- Jobs ------------------------------------------------------------------------------------

    def follow(self, job: str) -> None:
        """Record that a caller waits for the job. `close` cancels the job unless `leave` was called for the job."""
        self._live.add(job)

    def leave(self, job: str, *, cancel: bool) -> None:
        """Record that no caller waits for the job any longer. If `cancel` is True, start the cancellation of the job.
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
            cancelling.add_done_callback(self._on_cancel)

    def _cancel(self, job: str) -> None:
        try:
            self._clients[-1].cancel(job)
        except (Refused, NotFound):
            return  # The job has ended, or was never submitted.
        except BackendError as error:
            log.warning("job %s could not be canceled: %s", job, error)

    def _on_cancel(self, cancelling: Future[None]) -> None:
        error = None if cancelling.cancelled() else cancelling.exception()
        if error and thread_cache.is_exiting():
            # While Python exits, threads cannot be started, so `close` must cancel the job. The job is added to `_live`
            # before the job is removed from `_cancelling`, so that `close` always finds the job.
            self._live.add(self._cancelling[cancelling])
        elif error:
            log.error("a job could not be canceled", exc_info=error)
        self._cancelling.pop(cancelling, None)

    def report_later(self, job: str) -> None:
        """Report a completed direct call to the manager after a moment, together with other calls.

        The manager usually knows the call from the worker's event. The report covers the loss of the event.
        """
        with self._report_lock:
            self._unreported.append(job)
            is_first = len(self._unreported) == 1
        if is_first:
            self._loop.call_soon_threadsafe(self._loop.call_later, REPORT_S, self._start_report)

    def _start_report(self) -> None:
        self._loop.run_in_executor(None, self.report)

    def report(self) -> None:
        """Report the completed direct calls to the manager now."""
        with self._report_lock:
            jobs, self._unreported = self._unreported, []
        try:
            if jobs:
                self._clients[-1].report_calls(jobs)
        except BatchlabError as error:
            log.warning("%d completed calls may be missing in the ledger: %s", len(jobs), error)

    # --- Closing ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel the jobs for which a caller still waits, and stop the grid if this process started the grid.

        Repeated calls of `close` do nothing.
        """
        # A forked child does not close the grid, because the grid belongs to the parent process.
        if self._closed or self.forked:
            return
        if threading.current_thread().name.startswith(_OURS):
            # Close the link on a new thread, because the current thread belongs to the link, and a thread cannot wait
            # for its own end.
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
            if self.ours and not self._others():
                steps.callback(self._stop_manager)
            steps.callback(lambda: None if is_stuck else self._delete_temporary())
            for client in self._clients:
                steps.callback(client.close)
            steps.callback(lambda: self._cancel_remaining(is_stuck))
            # The report precedes the wait for the ends of jobs, because the manager also ends the reported calls.
            steps.callback(self.report)
            steps.callback(self.direct_calls.close)
            # The check of the event loop is not one of the callbacks, because the callbacks must run even if the check
            # is interrupted.
            is_stuck = self._is_stuck()

    def _delete_temporary(self) -> None:
        if self._temporary and self._thread.is_alive():
            try:
                self.start(self.objects.delete(sorted(self._temporary))).result()
                self._temporary.clear()
            except BackendError as error:
                log.warning("%d values of Grid.put remain in the bucket: %s", len(self._temporary), error)

    def _cancel_remaining(self, is_stuck: bool) -> None:
        cancelling = dict(self._cancelling)
        if not is_stuck:
            wait(cancelling)
        failed = set(cancelling.values())
        if not is_stuck:  # If the event loop is stuck, the lock of a future may be held forever.
            failed = {job for future, job in cancelling.items() if not future.cancelled() and future.exception()}
        for job in failed | self._live:
            # The cancellation runs on the current thread, because threads cannot be started while Python exits.
            self._cancel(job)
            self._ending.append(job)
        if self.ours and self._ending:
            self._wait_for_ends()

    def _is_stuck(self) -> bool:
        """Return whether the event loop is stuck.

        If Ctrl-C interrupts a thread that waits for a future, the future's lock may stay locked. An event loop that
        waits for the future's lock is stuck.
        """
        responded = threading.Event()
        self._loop.call_soon_threadsafe(responded.set)
        if responded.wait(LOOP_TIMEOUT_S):
            return False
        log.warning("the grid's event loop does not respond, so its thread is not ended")
        return True

    def _wait_for_ends(self) -> None:
        """Wait until the manager lists the jobs in `_ending` as ended.

        If the manager stopped before it recorded the end of a job, the next manager would list the ended job as
        running.
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
        # Check the record, because the manager of this process may have ended, and another process may have started a
        # new manager.
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
