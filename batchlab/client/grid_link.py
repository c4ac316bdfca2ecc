"""The grid that a program talks to: brought up if there is none, revived, taken down.

Invariant: what this process has started is ended by it, however it is left; a grid that was there
before stays up. Jobs that nobody waits for any more are cancelled, here or there.
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
LOOK_S = 0.1
_OURS = "batchlab-grid"
"""The event loop's thread and those of its pool have names that begin so."""
STUCK_S = 10.0
"""An event loop that does nothing for so long does nothing any more."""
ENDING_S = 3.0
"""How long closing waits for jobs to show that they have ended."""


class Link:
    """A connection to the manager of `home`, and the thread that the async ports run on."""

    def __init__(self, backend: Backend, home: Home, pools: Sequence[Pool]) -> None:
        """`pools` size a grid that is brought up; UsageError with them where one is up."""
        self.backend = backend
        self.home = home
        self.clock = backend.open_clock()
        self.ids = backend.open_ids()
        self.patience = factory.patience()
        self.ours = False
        """Whether we have brought up the grid, and end it."""
        self._pools = pools
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._clients: list[Client] = []
        """The last one counts. A thread may still be talking through those before it."""
        self._live: set[str] = set()
        self._cancelling: dict[Future[None], str] = {}
        """The jobs that the event loop is having cancelled."""
        self._ending: deque[str] = deque(maxlen=64)
        self._folder: Path | None = None
        self._connect()
        # Not before: only a grid that is up, or has been, says where its bucket is.
        self.objects = backend.open_objects(home)
        self.files = backend.open_local_files(home)
        self._loop = asyncio.new_event_loop()
        # A daemon, or the interpreter would wait for it before anybody is told to close.
        self._loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix=_OURS))
        self._thread = threading.Thread(target=self._loop.run_forever, name=_OURS, daemon=True)
        self._thread.start()

    # --- The manager -----------------------------------------------------------------------------

    def _connect(self) -> None:
        self.backend.named_place(self.home)  # refuses another endpoint than this home's
        record = self.home.record()
        if record is None:
            record = manager_process.start_manager(
                self.home, self.backend, pools=self._pools, parent=True
            )
            # Somebody else may have been faster, just now.
            self.ours = self._has_started(record)
        elif self._pools and not self.ours:
            raise UsageError(
                f"A grid is up in {self.home.path}, so it cannot be sized here.",
                remedy="Leave out workers, pools and warm, or name another folder as home.",
            )
        remedy = f'Say Grid("{record.backend}"), or name another folder as home.'
        self.home.check_backend(record, self.backend.name, remedy)
        self._check_python()
        self._clients.append(Client.of(self.home, record))

    def _has_started(self, record: ManagerRecord) -> bool:
        """Return whether this process started that manager, or the containers that it runs in."""
        if self.backend.capabilities.container_manager:
            return manager_process.has_started(self.home, record)
        return _is_child(record.pid)  # a forked process has copies of what its parent knows

    def _check_python(self) -> None:
        try:
            self.backend.check_python(self.home)
        except UsageError:
            if self.ours:
                manager_process.stop_manager(self.home)
            raise

    @property
    def client(self) -> Client:
        """The manager's client; UsageError once closed."""
        self.check_open()
        return self._clients[-1]

    @property
    def forked(self) -> bool:
        """Whether this is the copy that a child of its process has got."""
        return os.getpid() != self._pid

    def check_open(self) -> None:
        """UsageError once closed."""
        # The thread is gone in a forked child too, where waiting for it would never end.
        if self._closed or not self._thread.is_alive():
            raise UsageError("This grid is closed in this process.", remedy="Make another Grid.")

    def call(self, ask: Callable[[Client], T]) -> T:
        """The manager's answer. One that has died is replaced if it was ours: the grid's state is
        in its folder, so nothing is lost."""
        give_up_s: float | None = None
        while True:
            client = self.client
            try:
                return ask(client)
            except Unreachable as error:
                now_s = self.clock.monotonic_s()
                give_up_s = give_up_s or now_s + patience_s(restarted=self._is_restarted)
                if now_s > give_up_s:
                    raise
                self._reconnect(client, error)

    @property
    def _is_restarted(self) -> bool:
        """Whether somebody else starts the manager again: we have not started this one."""
        return not self.ours and self.backend.restarts_manager(self.home)

    def _reconnect(self, client: Client, error: Unreachable) -> None:
        with self._lock:
            if self._closed or client is not self._clients[-1]:
                return
            record = self.home.record()
            if record is None and not self.ours:
                if not self._is_restarted:
                    raise error
                time.sleep(LOOK_S)
                return
            if record is None or record.url != client.url:
                log.warning("the manager has ended; going on with another one")
                self._connect()
                return
        time.sleep(0.05)  # it is there, but very busy

    # --- The ports -------------------------------------------------------------------------------

    def start(self, doing: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the event loop's thread."""
        return asyncio.run_coroutine_threadsafe(doing, self._loop)

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine; interrupted, it is cancelled. UsageError once closed."""
        try:
            self.check_open()
        except UsageError:
            doing.close()  # never begun
            raise
        future = self.start(doing)
        try:
            return future.result()
        finally:
            future.cancel()

    @property
    def folder(self) -> Path:
        """Of this process's own, for files that are fetched; removed by `close`."""
        if self._folder is None:
            self._folder = self.home.scratch / self.ids.fresh("client")
        return self._folder

    # --- Jobs ------------------------------------------------------------------------------------

    def follow(self, job: str) -> None:
        """Somebody waits for this job: `close` cancels it unless `leave` came first."""
        self._live.add(job)

    def leave(self, job: str, *, cancel: bool) -> None:
        """Nobody waits for the job any more. Does not wait for the cancellation: `close` does.

        May come from the garbage collector, on any thread and after `close`.
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
            return  # it has ended meanwhile, or never arrived
        except BackendError as error:
            log.warning("job %s is not cancelled: %s", job, error)

    def _cancelled(self, cancelling: Future[None]) -> None:
        error = None if cancelling.cancelled() else cancelling.exception()
        if error and thread_cache.begun():
            # A program that ends of its job's failure: no thread can be started any more. Before
            # it is forgotten here, so that `close`, which comes next, finds it at any moment.
            self._live.add(self._cancelling[cancelling])
        elif error:
            log.error("a job is not cancelled", exc_info=error)
        self._cancelling.pop(cancelling, None)

    # --- The end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what is left, end the grid if it is ours. May be called again."""
        # A forked child has this object too, but the grid is its parent's.
        if self._closed or self.forked:
            return
        if threading.current_thread().name.startswith(_OURS):
            # The last reference may be dropped anywhere, and none of our threads can end itself.
            threading.Thread(target=self.close, name="batchlab-close").start()
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        is_stuck = True
        with ExitStack() as last:
            last.callback(self._remove_folder)
            last.callback(lambda: None if is_stuck else self._stop_loop())
            if self.ours:
                last.callback(self._stop_manager)
            for client in self._clients:
                last.callback(client.close)
            last.callback(lambda: self._cancel_left(is_stuck))
            # Only here: an interrupt while it waits must not leave all of the above undone.
            is_stuck = self._is_stuck()

    def _cancel_left(self, is_stuck: bool) -> None:
        cancelling = dict(self._cancelling)
        if not is_stuck:
            wait(cancelling)
        undone = set(cancelling.values())
        if not is_stuck:  # where it is, a future's lock may be held for ever
            undone = {
                job
                for future, job in cancelling.items()
                if not future.cancelled() and future.exception()
            }
        for job in undone | self._live:
            # Here and not on threads: at the interpreter's end none can be started any more.
            self._cancel(job)
            self._ending.append(job)
        if self.ours and self._ending:
            self._see_them_end()

    def _is_stuck(self) -> bool:
        """Whether the event loop does nothing any more: an interrupt may hit whoever waits for one
        of its futures with that future's lock just taken, which the loop then waits for."""
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        if answered.wait(STUCK_S):
            return False
        log.warning("the grid's event loop is stuck, and left behind")
        return True

    def _see_them_end(self) -> None:
        """A grid that goes down a moment too soon would show a finished job as running."""
        client = self._clients[-1]
        give_up_s = self.clock.monotonic_s() + ENDING_S
        try:
            for view in client.jobs(active=True):
                while (
                    view["id"] in self._ending
                    and view["state"] not in ENDED
                    and self.clock.monotonic_s() < give_up_s
                ):
                    view = client.job(view["id"], version=view["version"], wait_s=ENDING_S)
        except BackendError as error:
            log.warning("the grid is stopped without knowing that its jobs have ended: %s", error)

    def _stop_manager(self) -> None:
        record = self.home.record()
        # Ours may have died, and somebody else's have taken its place.
        if record and self._has_started(record):
            manager_process.stop_manager(self.home)

    def _stop_loop(self) -> None:
        self.start(_cancel_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
