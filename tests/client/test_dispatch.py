"""The thread of an executor with a fake grid, in which every future must end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, cast

import pytest

from batchlab.client import results, thread_cache
from batchlab.client.dispatch import Dispatch
from batchlab.client.futures import BrokenGridExecutor, Call, CallFuture, Packer, Sender, WorkerDied
from batchlab.client.submission import MAP, ObjectPickler
from batchlab.core.errors import JobFailed, TaskFailed, Unreachable, UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Outcome, StageName, TaskSet
from tests.support.waiting import until

JOB = JobId("job-0")
WAIT_S = 20.0


class FakeGrid:
    """A fake link and sender of calls, which accepts jobs or fails, and never runs a job."""

    def __init__(self) -> None:
        self.pickler = ObjectPickler()
        self.forked = False
        self.closed = False
        self.problem: BaseException | None = None
        self.hang_up: BaseException | None = None
        """The error that the wait for first outcomes raises."""
        self.sent: list[tuple[str, int]] = []
        """The id and the number of calls of each sent job."""
        self.left: list[tuple[str, bool]] = []
        self.started: list[str] = []
        """Names of the coroutines that the event loop received."""
        self.go = threading.Event()
        """The sender waits for this event."""
        self.go.set()
        self._watched = threading.Semaphore(0)

    def wait_for_job(self) -> None:
        """Return once for each sent job, when the client starts to wait for the job's outcomes."""
        assert self._watched.acquire(timeout=WAIT_S)

    def check_open(self) -> None:
        if self.closed:
            raise UsageError("This grid is closed in this process.", remedy="Make another Grid.")

    def start(self, doing: Coroutine[Any, Any, Any]) -> Future[None]:
        self.started.append(getattr(doing, "__name__", ""))
        doing.close()
        self._watched.release()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def leave(self, job: str, *, cancel: bool) -> None:
        self.left.append((job, cancel))

    def draft(self, name: str, stage: StageDef) -> JobDef:
        return JobDef(JobId(f"job-{len(self.sent)}"), name, (stage,), 0.0, token="t")

    def run(self, doing: Coroutine[Any, Any, Any]) -> None:
        asyncio.run(doing)

    def send(self, draft: JobDef, pickled: bytes, chunks: Any, accepted: Callable[[], None], *, wait_s: float) -> Any:
        assert self.go.wait(WAIT_S)
        if self.problem:
            raise self.problem
        self.sent.append((draft.id, sum(len(chunk.items) for chunk in chunks)))
        accepted()
        if self.hang_up:
            accepted()  # a second try of the submission does the same
            raise self.hang_up
        return {"outcomes": [], "ended": False}


@pytest.fixture
def grid() -> FakeGrid:
    return FakeGrid()


@pytest.fixture
def dispatch(grid: FakeGrid) -> Iterator[Dispatch]:
    fake: Any = grid
    made = Dispatch(None, fake, Sender(fake, fake, Packer(grid.pickler), None, StageDef(MAP)))
    yield made
    grid.go.set()
    made.abandon()
    if turn := made._turn:
        assert turn.over.wait(WAIT_S)


def submit(dispatch: Dispatch, function: Callable[..., Any] = abs, *args: Any) -> CallFuture:
    future = CallFuture()
    dispatch.submit(Call(future, function, args, {}))
    return future


def outcome(*values: Any, failed: tuple[Failure, ...] = (), first: int = 0) -> Outcome:
    tasks = TaskSet.span(first, first + len(values))
    bundle = Bundle(JOB, StageName("map"), tasks)
    return Outcome(bundle, "e", "w", 0.0, 1.0, tasks, values, failed=failed)


def view(state: str, reason: str = "") -> Any:
    return {"state": state, "reason": reason}


@pytest.mark.parametrize("error", [Unreachable("it hung up"), UsageError("closed")])
def test_accepted_batch_is_watched_after_any_error(grid: FakeGrid, dispatch: Dispatch, error: BaseException) -> None:
    grid.hang_up = error
    future = submit(dispatch)
    grid.wait_for_job()
    assert not future.done()
    dispatch.outcome(JOB, outcome(7))
    assert future.result(WAIT_S) == 7


def test_each_result_arrives_once(grid: FakeGrid, dispatch: Dispatch) -> None:
    calls = [Call(CallFuture(), abs, (i,), {}) for i in range(3)]
    dispatch.submit_all(calls, bundle=None)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(10, 11))
    dispatch.outcome(JOB, outcome(99, 98))
    dispatch.outcome(JOB, outcome(12, first=2))
    assert [call.future.result(WAIT_S) for call in calls] == [10, 11, 12]
    dispatch.shutdown(wait=True, cancel=False)
    assert grid.left == [(JOB, False)]


def test_calls_are_batched_during_a_submission(grid: FakeGrid, dispatch: Dispatch) -> None:
    grid.go.clear()
    first = submit(dispatch, abs, 0)
    until(first.running)
    for i in range(50):
        submit(dispatch, abs, i)
    grid.go.set()
    grid.wait_for_job()
    grid.wait_for_job()
    assert grid.sent == [("job-0", 1), ("job-1", 50)]


def test_shutdown_keeps_a_batch_with_a_refused_cancellation(grid: FakeGrid, dispatch: Dispatch) -> None:
    """A caller whose `cancel` returned False relies on the result of the call."""
    calls = [Call(CallFuture(), abs, (i,), {}) for i in range(2)]
    dispatch.submit_all(calls, bundle=None)
    grid.wait_for_job()
    assert not calls[0].future.cancel()
    dispatch.shutdown(wait=False, cancel=True)
    dispatch.outcome(JOB, outcome(10, 11))
    assert [call.future.result(WAIT_S) for call in calls] == [10, 11]
    assert "_cancel" not in grid.started


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_a_call_whose_cancellation_was_refused_is_never_canceled(
    grid: FakeGrid, dispatch: Dispatch, *, is_abandoned: bool
) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.shutdown(wait=False, cancel=True)
    until(lambda: "_cancel" in grid.started)
    assert not call.cancel()
    if is_abandoned:
        dispatch.abandon()
    else:
        dispatch.on_end(JOB, view("CANCELLED"))
    with pytest.raises(JobFailed, match="canceled together with its executor"):
        call.result(WAIT_S)
    assert not call.cancelled()


def test_refused_job_fails_only_its_own_calls(grid: FakeGrid, dispatch: Dispatch) -> None:
    grid.problem = UsageError("No.", remedy="Yes.")
    with pytest.raises(JobFailed, match="The call is lost: No"):
        submit(dispatch).result(WAIT_S)
    grid.problem = None
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(5))
    assert call.result(WAIT_S) == 5


def test_a_manager_that_does_not_answer_breaks_the_executor(grid: FakeGrid, dispatch: Dispatch) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.on_loss(JOB, Unreachable("It does not answer."))
    error = call.exception(WAIT_S)
    assert isinstance(error, BrokenGridExecutor)
    with pytest.raises(BrokenGridExecutor, match="does not answer") as caught:
        submit(dispatch)
    assert caught.value is not error


def test_unsent_calls_fail_too(grid: FakeGrid, dispatch: Dispatch) -> None:
    grid.go.clear()
    grid.problem = Unreachable("It does not answer.")
    first = submit(dispatch)
    until(first.running)
    second, third = submit(dispatch), submit(dispatch)
    assert second.cancel()
    grid.go.set()
    for call in (first, third):
        assert isinstance(call.exception(WAIT_S), BrokenGridExecutor)
    assert second.cancelled()


def test_any_error_during_a_submission_ends_the_calls(grid: FakeGrid, dispatch: Dispatch) -> None:
    grid.problem = MemoryError("none left")
    with pytest.raises(JobFailed, match="none left"):
        submit(dispatch).result(WAIT_S)


def test_bug_in_the_dispatch_leaves_no_caller_waiting(
    grid: FakeGrid, dispatch: Dispatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.outcome(JOB, cast(Any, "no outcome"))
    assert isinstance(call.exception(WAIT_S), BrokenGridExecutor)
    assert "an executor has failed" in caplog.text


def test_a_closed_grid_refuses(grid: FakeGrid, dispatch: Dispatch) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    grid.closed = True
    dispatch.on_loss(JOB, CancelledError())
    with pytest.raises(BrokenGridExecutor, match="The grid was closed"):
        call.result(WAIT_S)
    with pytest.raises(BrokenGridExecutor, match="closed in this process"):
        submit(dispatch)


def test_job_that_ends_early_gives_the_reason(grid: FakeGrid, dispatch: Dispatch) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.on_end(JOB, view("CANCELLED", "by hand"))
    with pytest.raises(JobFailed, match=r"Job job-0 ended CANCELLED \(by hand\) before"):
        call.result(WAIT_S)


@pytest.mark.parametrize(("kind", "error"), [(FailureKind.EXIT, WorkerDied), (FailureKind.TIMEOUT, TaskFailed)])
def test_a_failure_is_its_own_calls_only(
    grid: FakeGrid, dispatch: Dispatch, kind: FailureKind, error: type[TaskFailed]
) -> None:
    calls = [Call(CallFuture(), abs, (i,), {}) for i in range(2)]
    dispatch.submit_all(calls, bundle=None)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(10, failed=(Failure(1, kind, "told"),)))
    assert calls[0].future.result(WAIT_S) == 10
    assert type(calls[1].future.exception(WAIT_S)) is error


def test_a_failure_that_is_tried_again_is_not_the_end(grid: FakeGrid, dispatch: Dispatch) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(failed=(Failure(0, FailureKind.LOST, "told", final=False),)))
    dispatch.outcome(JOB, outcome(4))
    assert call.result(WAIT_S) == 4


def test_without_room_for_a_thread_calls_are_sent_all_the_same(
    grid: FakeGrid, dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.12 on, a thread cannot start during the interpreter's shutdown."""
    run = thread_cache.run

    def full(_: thread_cache.Work) -> None:
        raise RuntimeError("can't start new thread")

    def once(work: thread_cache.Work, then: thread_cache.Work) -> None:
        run(work, then)
        monkeypatch.setattr(thread_cache, "run", full)

    monkeypatch.setattr(thread_cache, "run", once)
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(6))
    assert call.result(WAIT_S) == 6


def test_a_thread_that_is_interrupted_while_it_starts_is_not_counted_on(
    grid: FakeGrid, dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may arrive when the new thread is already running. The thread ends, and the next call starts another
    one."""
    start = threading.Thread.start
    late: list[threading.Thread] = []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        late.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(thread_cache, "run", thread_cache.ThreadCache("interrupted", 0.01).run)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(dispatch)
    monkeypatch.setattr(threading.Thread, "start", start)
    late[0].join(WAIT_S)
    assert not late[0].is_alive()
    call = submit(dispatch)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(6))
    assert call.result(WAIT_S) == 6


def test_a_forked_child_waits_for_nothing(grid: FakeGrid, dispatch: Dispatch) -> None:
    submit(dispatch)
    grid.forked = True
    with dispatch._lock:
        dispatch.shutdown(wait=True, cancel=True)
    grid.forked = False


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_ends_while_its_parent_has_calls_out(grid: FakeGrid, dispatch: Dispatch) -> None:
    call = submit(dispatch)
    grid.wait_for_job()
    child = os.fork()
    if not child:
        thread_cache._at_exit()  # Python calls this function at its end
        os._exit(0)
    end_s = time.monotonic() + WAIT_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    dispatch.outcome(JOB, outcome(6))
    assert call.result(WAIT_S) == 6


def test_outcome_listed_twice_is_read_once(grid: FakeGrid, dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a submission contains outcomes that later listings contain again."""
    read: list[Sequence[int]] = []

    def noting(link: Any, where: Any, stage: Any, tasks: Any, *rest: Any) -> Iterator[Any]:
        read.append(list(tasks))
        yield from results.decode_all(link, where, stage, tasks, *rest)

    monkeypatch.setattr("batchlab.client.dispatch.decode_all", noting)
    futures = [CallFuture(), CallFuture()]
    dispatch.submit_all([Call(future, abs, (-1,), {}) for future in futures], bundle=None)
    grid.wait_for_job()
    dispatch.outcome(JOB, outcome(6))
    assert futures[0].result(WAIT_S) == 6
    dispatch.outcome(JOB, outcome(6))
    dispatch.outcome(JOB, outcome(7, first=1))
    assert futures[1].result(WAIT_S) == 7
    assert read == [[0], [1]]


def test_no_call_is_taken_while_python_ends(dispatch: Dispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_cache, "is_exiting", lambda: True)
    with pytest.raises(RuntimeError, match="after interpreter shutdown"):
        submit(dispatch)
