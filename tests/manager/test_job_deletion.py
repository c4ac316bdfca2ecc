"""Deletion of ended jobs, and its recovery after a crash between any two of its writes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from batchlab.core import commit
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Refused, Unreachable
from batchlab.core.job_definition import Dependency, InputDef
from batchlab.core.model import JobId, JobState
from batchlab.core.ports import AddJob
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.job_deletion import JobDeletion
from batchlab.manager.ledger_rebuild import lost_jobs, rebuild
from tests.support.server.api import Rig, job


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


class KilledError(Exception):
    """The end of the manager's process."""


class Crash:
    """Let the calls that write raise KilledError after `left` successful calls.

    If `late` is true, the call that raises the error still has its effect.
    """

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.late = 1000, False
        for port, names in ((rig.objects, ("put", "delete")), (rig.ledger, ("forget",))):
            for name in names:
                monkeypatch.setattr(port, name, self._counted(getattr(port, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not (self.late and self.left == -1):
                raise KilledError
            answer = await call(*args, **kwargs)
            if self.left < 0:
                raise KilledError
            return answer

        return counted


def ended(rig: Rig, token: str = "t", *, bad: tuple[int, ...] = ()) -> JobId:
    name = rig.submit(job(token=token))
    rig.work(name, 4, bad=bad)
    rig.ended(name)
    rig.until(lambda: JobId(name) not in rig.manager.lives, "the end of the job's task")
    return JobId(name)


def objects_of(rig: Rig, name: str) -> list[str]:
    async def keys() -> list[str]:
        return [info.key async for page in rig.objects.list("") for info in page if f"/{name}" in info.key]

    return rig.run(keys())


def deletion(rig: Rig) -> JobDeletion:
    """Return the deletion of a manager that has just started."""
    return JobDeletion(rig.manager.context, rig.manager.job_record, is_never_awaited, rig.manager.spending)


async def is_never_awaited(_: JobId) -> bool:
    return False


def is_gone(rig: Rig, name: JobId) -> bool:
    """Return whether only the note about the deletion is left of the job, and the time of the sweep."""
    spec = object_keys.spec(name)
    if set(objects_of(rig, name)) - {object_keys.deletion(name)} != {spec} or name in [
        view["id"] for view in rig.client.jobs()
    ]:
        return False
    return rig.run(rig.objects.get(spec)) == json_format.deleted_job(name)


def test_deleted_job_leaves_only_a_note(rig: Rig) -> None:
    name, other = ended(rig, bad=(1,)), ended(rig, "other")
    before = objects_of(rig, other)
    assert len(rig.client.failures(name)) == 1
    count = len(objects_of(rig, name))
    assert rig.client.delete(name) == {"id": name, "objects": count - 1}
    assert rig.client.delete(name) == {"id": name, "objects": 0}
    assert is_gone(rig, name)
    assert objects_of(rig, other) == before
    for call in (rig.client.job, rig.client.failures, rig.client.retry):
        with pytest.raises(NotFound):
            call(name)
    rig.client.rebuild()
    assert [view["id"] for view in rig.client.jobs()] == [other]


def test_only_an_ended_job_is_deleted(rig: Rig) -> None:
    name = rig.submit(job())
    with pytest.raises(Refused, match="only an ended job can be deleted") as refused:
        rig.client.delete(name)
    assert f"batchlab job cancel {name}" in refused.value.remedy
    rig.work(name, 4)
    assert rig.ended(name)["state"] == "SUCCEEDED"


def test_id_of_a_deleted_job_is_not_used_again(rig: Rig) -> None:
    name = ended(rig)
    rig.client.delete(name)
    with pytest.raises(Refused, match="was deleted, and its id cannot be used again"):
        rig.client.submit(job())
    assert is_gone(rig, name)


def test_input_of_an_active_job_is_kept(rig: Rig) -> None:
    name = ended(rig)
    reader = job("reader", "reader", tasks=1)
    reader = replace(reader, input=InputDef(keys=(f"{object_keys.raw(name)}0",)))
    rig.submit(reader)
    with pytest.raises(Refused, match=f"Job {reader.id} reads objects of job {name}"):
        rig.client.delete(name)
    rig.work(reader.id, 1)
    rig.ended(reader.id)
    rig.client.delete(name)
    assert is_gone(rig, name)


def test_rebuild_removes_deleted_jobs_from_the_ledger_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted, names = ended(rig, "deleted"), sorted([ended(rig), ended(rig, "other")])
    rig.client.delete(deleted)
    for name in names:
        rig.run(rig.objects.put(object_keys.spec(name), json_format.deleted_job(name)))
    forget, calls = rig.ledger.forget, []

    async def counted(jobs: Sequence[JobId] | None = None) -> None:
        calls.append(jobs)
        await forget(jobs)

    monkeypatch.setattr(rig.ledger, "forget", counted)
    rig.run(rebuild(replace(rig.manager.ports, ledger=rig.ledger)))
    assert calls == [names]
    assert not rig.client.jobs()


def test_job_whose_schedule_waits_for_its_end_is_kept(rig: Rig) -> None:
    name = ended(rig)

    async def is_awaited(job: JobId) -> bool:
        return job == name

    awaited = JobDeletion(rig.manager.context, rig.manager.job_record, is_awaited)
    with pytest.raises(Refused, match="has not recorded the end"):
        rig.run(awaited.delete(name))
    assert rig.client.job(name)["state"] == "SUCCEEDED"


def test_retry_that_another_manager_has_begun_prevents_the_deletion(rig: Rig) -> None:
    name = ended(rig, bad=(1,))
    plan = rig.run(rig.manager.job_commands._retries.plan(rig.run(rig.ledger.job(name)), None, {}))
    rig.run(rig.objects.put(object_keys.retry(name, 1), plan.to_bytes()))
    with pytest.raises(Refused, match="is retried at the moment"):
        rig.client.delete(name)
    assert object_keys.deletion(name) not in objects_of(rig, name)
    assert rig.client.job(name)["state"] == "FAILED"


def test_repeated_deletion_removes_objects_that_a_worker_has_written_late(rig: Rig) -> None:
    name = ended(rig)
    rig.client.delete(name)
    rig.run(rig.objects.put(f"jobs/{name}/map/outcomes/5c/late.json", b"{}"))
    rig.run(rig.objects.put(f"files/{name}/map/x/late.bin", b"x"))
    assert rig.client.delete(name) == {"id": name, "objects": 2}
    assert is_gone(rig, name)
    with pytest.raises(NotFound):
        rig.client.delete("sums-0123456789")


def test_run_whose_job_is_deleted_ends_refused(rig: Rig) -> None:
    """The schedule has not recorded the end of its run before the deletion."""
    rig.submit(job())
    rig.client.add_schedule({"name": "nightly", "cron": "0 2 * * *", "timezone": "Europe/Berlin"}, job())
    run = rig.client.run_schedule("nightly", "mine")["job"]
    assert run
    scheduler = rig.manager.scheduler
    assert scheduler
    rig.outstanding(run, 4)
    rig.run(scheduler._lock.acquire())
    try:
        rig.work(run, 4)
        rig.ended(run)
        rig.until(lambda: JobId(run) not in rig.manager.lives, "the end of the job's task")
        waiting = JobDeletion(rig.manager.context, rig.manager.job_record, is_awaited_by(rig))
        with pytest.raises(Refused, match="has not recorded the end"):
            rig.run(waiting.delete(JobId(run)))
        rig.run(deletion(rig).delete(JobId(run)))
    finally:
        rig._loop.call_soon_threadsafe(scheduler._lock.release)
    rig.until(lambda: rig.client.schedule("nightly")["runs"][0]["result"], "the end of the run")
    assert [run["result"] for run in rig.client.schedule("nightly")["runs"]] == ["REFUSED"]
    assert rig.client.run_schedule("nightly", "again")["job"] != run


def is_awaited_by(rig: Rig) -> Callable[[JobId], Awaitable[bool]]:
    """Return the manager's own check, without the wait for the schedules that the test holds."""

    async def is_awaited(job: JobId) -> bool:
        assert rig.manager.scheduler
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rig.manager.scheduler, "wait_until_read", nothing)
            return await rig.manager._is_awaited(job)

    return is_awaited


async def nothing() -> None:
    """Do not wait."""


def test_manager_continues_a_deletion_that_the_backend_has_interrupted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion of one job fails, and does not prevent the deletion of the next job."""
    names = sorted([ended(rig), ended(rig, "other")])
    delete, is_down = rig.objects.delete, True

    async def refused(keys: Sequence[str]) -> None:
        if is_down and any(names[0] in key for key in keys):
            raise Unreachable("The bucket does not respond.")
        await delete(keys)

    monkeypatch.setattr(rig.objects, "delete", refused)
    monkeypatch.setattr(rig.manager.job_deletion, "_settings", replace(rig.manager.settings, silence_s=0.05))
    with pytest.raises(BackendError, match="does not respond"):
        rig.client.delete(names[0])
    rig.run(rig.objects.put(object_keys.deletion(names[1]), json_format.deleted_job(names[1])))
    rig.manager.job_deletion.is_search_due.set()
    rig.until(lambda: is_gone(rig, names[1]), "the deletion of the other job")
    assert not is_gone(rig, names[0])
    is_down = False
    rig.until(lambda: is_gone(rig, names[0]), "the deletion")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad", [(), (1,)])
def test_next_manager_finishes_an_interrupted_deletion(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, late: bool, bad: tuple[int, ...]
) -> None:
    """The manager dies at each write of the deletion, before or after the write has its effect."""
    crash = Crash(rig, monkeypatch)
    for writes in range(100):
        name = ended(rig, f"t{writes}", bad=bad)
        crash.left, crash.late = writes, late
        try:
            rig.run(deletion(rig).delete(name))
        except KilledError:
            is_interrupted = True
        else:
            is_interrupted = False
        crash.left = 1000
        # No command and no rebuild of the ledger starts the job again.
        has_begun = object_keys.deletion(name) in objects_of(rig, name)
        if has_begun and writes + late > 1:
            with pytest.raises((NotFound, Refused)):
                rig.client.retry(name)
        rig.client.rebuild()
        states = {view["id"]: view["ended_s"] for view in rig.client.jobs()}
        assert states.get(name, 1.0) is not None
        rig.run(deletion(rig).finish_interrupted())
        if not is_interrupted:
            assert is_gone(rig, name)
            assert writes > 6
            return
        if not has_begun and name in states:
            rig.client.delete(name)
        assert is_gone(rig, name), writes
    pytest.fail("the deletion did not end")


@pytest.mark.parametrize("late", [False, True])
def test_id_is_not_used_again_while_a_deletion_is_interrupted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A client submits the job again after each crash. The submission finds the ended job, or is refused."""
    crash = Crash(rig, monkeypatch)
    for writes in range(100):
        name = ended(rig, f"t{writes}", bad=(1,))
        crash.left, crash.late = writes, late
        try:
            rig.run(deletion(rig).delete(name))
        except KilledError:
            is_interrupted = True
        else:
            is_interrupted = False
        crash.left = 1000
        with suppress(Refused):
            assert rig.client.submit(job(token=f"t{writes}"))["state"] == "FAILED", writes
        rig.run(deletion(rig).finish_interrupted())
        if not is_interrupted:
            assert is_gone(rig, name)
            assert writes > 6
            return
        if name in [view["id"] for view in rig.client.jobs()]:
            rig.client.delete(name)
        assert is_gone(rig, name), writes
    pytest.fail("the deletion did not end")


def test_late_call_of_a_suspended_manager_keeps_the_note(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager is suspended before its N-th write while another manager finishes the deletion, and dies after the
    write."""
    name, left = JobId(""), 1000

    async def suspended(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left != -1:
            return await call(*args, **options)
        with suppress(NotFound):  # the ledger has forgotten the job
            await deletion(rig).delete(name)
        await deletion(rig).finish_interrupted()
        with suppress(AlreadyExists):
            await call(*args, **options)
        raise KilledError

    for port, method in ((rig.objects, "put"), (rig.objects, "delete"), (rig.ledger, "forget")):
        monkeypatch.setattr(port, method, partial(suspended, getattr(port, method)))
    for number in range(100):
        left = 1000
        name = ended(rig, f"t{number}", bad=(1,))
        left = number
        with suppress(KilledError):
            rig.run(deletion(rig).delete(name))
        is_complete, left = left >= 0, 1000
        with pytest.raises(Refused, match="its id cannot be used again"):
            rig.client.submit(job(token=f"t{number}"))
        rig.run(deletion(rig).finish_interrupted())
        # A late PUT leaves a note at the key of the next retry.
        rig.client.delete(name)
        assert is_gone(rig, name), number
        if is_complete:
            assert number > 6
            return
    pytest.fail("the deletion did not end")


def test_late_objects_of_a_deleted_job_are_swept(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker was suspended during the deletion. The next leader reads the time of the sweep from the bucket."""
    monkeypatch.setattr("batchlab.manager.job_deletion.SWEEP_S", 0.0)
    rig.manager.context.settings = replace(rig.manager.settings, silence_s=0.02)
    name = ended(rig)
    rig.run(deletion(rig).delete(name))
    late = f"files/{name}/map/x/late.bin"
    rig.run(rig.objects.put(late, b"x"))
    rig.manager.job_deletion.is_search_due.set()
    rig.until(lambda: objects_of(rig, name) == [object_keys.spec(name)], "the sweep")


def test_event_during_an_interrupted_deletion_does_not_drop_its_request(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend fails after the ledger has forgotten the job. The sweep after the event finishes the deletion."""
    rig.manager.context.settings = replace(rig.manager.settings, silence_s=0.02)
    name, interrupted = ended(rig), deletion(rig)
    reference = object_keys.reference_key(name)
    rig.run(rig.objects.put(reference, b"{}"))
    delete = rig.objects.delete

    async def refused(keys: Sequence[str]) -> None:
        if reference in keys:
            raise Unreachable("The bucket does not respond.")
        await delete(keys)

    with monkeypatch.context() as patch:
        patch.setattr(rig.objects, "delete", refused)
        with pytest.raises(Unreachable):
            rig.run(interrupted.delete(name))

    async def sweep() -> None:
        await interrupted.sweep_late(name)
        running = asyncio.create_task(interrupted.run())
        while await rig.objects.head(object_keys.deletion(name)) and not await commit.sweep_time(rig.objects, name):
            await asyncio.sleep(0.01)
        running.cancel()

    rig.run(sweep())
    assert rig.run(rig.objects.head(reference)) is None
    assert rig.run(commit.sweep_time(rig.objects, name))
    assert is_gone(rig, name)


def test_job_that_is_submitted_during_the_deletion_of_its_input_never_runs_with_a_part(rig: Rig) -> None:
    """The job waits while the deletion may still be refused, and is FAILED after the deletion."""
    name = ended(rig)
    rig.run(rig.objects.put(object_keys.deletion(name), json_format.deleted_job(name)))
    reader = replace(job("reader", "reader"), input=InputDef(keys=(object_keys.raw(name),)))
    rig.client.submit(reader)
    rig.until(lambda: "is being deleted" in rig.manager.lives[reader.id].trouble, "the wait for the deletion")
    rig.run(rig.objects.put(object_keys.spec(name), json_format.deleted_job(name)))
    view = rig.ended(reader.id)
    assert view["state"] == "FAILED"
    assert f"The input belongs to job {name}, which was deleted" in view["reason"]


@pytest.mark.parametrize("prefix", ["jobs/", "raw/", "files/", "logs/", "reports/"])
def test_job_that_reads_the_objects_of_all_jobs_waits_for_deletions(rig: Rig, prefix: str) -> None:
    name, swept = ended(rig), ended(rig, "swept")
    rig.client.delete(swept)
    rig.run(rig.objects.put(f"{prefix}{name}/late.json", b"{}"))
    rig.run(rig.objects.put(object_keys.deletion(name), json_format.deleted_job(name)))
    reader = replace(job("reader", "reader"), input=InputDef(keys=(prefix,)))
    rig.client.submit(reader)
    rig.until(lambda: "is being deleted" in rig.manager.lives[reader.id].trouble, "the wait for the deletion")
    assert f"job {name} is being deleted" in rig.manager.lives[reader.id].trouble
    rig.run(rig.objects.delete([object_keys.deletion(name)]))
    rig.until(lambda: rig.client.job(reader.id)["stages"][0]["planned"], "the plan after the end of the deletion")
    with pytest.raises(Refused, match=f"Job {reader.id} reads objects of job {name}"):
        rig.client.delete(name)


def test_active_job_that_another_manager_accepted_keeps_its_input(rig: Rig) -> None:
    name = ended(rig)
    reader = replace(job("reader", "reader"), input=InputDef(keys=(object_keys.JOBS,)), start_at_s=4e9)
    rig.run(rig.ledger.apply(AddJob(reader, JobState.SCHEDULED, None)))
    with pytest.raises(Refused, match=f"Job {reader.id} reads objects of job {name}"):
        rig.client.delete(name)
    assert object_keys.deletion(name) not in objects_of(rig, name)


def test_committed_deletion_is_finished_although_a_new_job_reads_the_input(rig: Rig) -> None:
    """A refusal would let the new job run with the part of its input that is not deleted yet."""
    name = ended(rig)
    rig.run(rig.objects.put(object_keys.retry(name, 1), json_format.deleted_job(name)))
    reader = replace(job("reader", "reader"), input=InputDef(keys=(f"{object_keys.raw(name)}0",)), start_at_s=4e9)
    rig.run(rig.ledger.apply(AddJob(reader, JobState.SCHEDULED, None)))
    rig.client.delete(name)
    assert is_gone(rig, name)


def test_committed_deletion_is_finished_if_the_bucket_lost_the_definition(rig: Rig) -> None:
    """The job is submitted again before the next leader finishes the deletion."""
    name = ended(rig)
    rig.run(rig.objects.put(object_keys.deletion(name), json_format.deleted_job(name)))
    rig.run(rig.objects.put(object_keys.retry(name, 1), json_format.deleted_job(name)))
    rig.run(rig.objects.delete([object_keys.spec(name)]))
    with pytest.raises(Refused, match="was deleted, and its id cannot be used again"):
        rig.client.submit(job())
    rig.run(deletion(rig).finish_interrupted())
    assert is_gone(rig, name)


def test_deletion_is_finished_if_the_ledger_and_the_bucket_lost_the_job(rig: Rig) -> None:
    name = ended(rig)
    rig.run(rig.objects.put(object_keys.deletion(name), json_format.deleted_job(name)))
    rig.run(rig.objects.delete([object_keys.spec(name)]))
    rig.client.rebuild()
    assert rig.client.delete(name)["objects"] > 0
    assert is_gone(rig, name)


@pytest.mark.parametrize("use", ["reads objects of", "depends on"])
@pytest.mark.parametrize("is_restored", [False, True])
def test_a_job_is_kept_for_an_active_job_that_the_ledger_has_lost(rig: Rig, is_restored: bool, use: str) -> None:
    name = ended(rig)
    reader = replace(job("reader", "reader"), start_at_s=4e9)
    if use == "depends on":
        reader = replace(reader, after=(Dependency(name),))
    else:
        reader = replace(reader, input=InputDef(keys=(f"{object_keys.raw(name)}0",)))
    rig.submit(reader)
    rig.run(rig.ledger.forget())
    if is_restored:
        rig.run(rig.manager.job_record(name))
    with pytest.raises(Refused, match=f"has lost job {reader.id}, which {use} job {name}") as refused:
        rig.client.delete(name)
    assert "batchlab grid rebuild-ledger" in refused.value.remedy
    assert object_keys.deletion(name) not in objects_of(rig, name)
    rig.client.rebuild()
    with pytest.raises(Refused, match=f"Job {reader.id} {use} job {name}"):
        rig.client.delete(name)
    rig.client.cancel(reader.id)
    rig.ended(reader.id)
    rig.client.delete(name)
    assert is_gone(rig, name)


def test_search_for_lost_jobs_skips_objects_of_large_jobs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.adapters.memory.objects.PAGE", 3)
    deleted = ended(rig, "deleted")
    rig.client.delete(deleted)
    names, spec = [ended(rig, f"t{number}") for number in range(3)], object_keys.spec(JobId("x"))
    for name in names:
        # The names of the stages are before and after the name of the definition.
        for key in (f"jobs/{name}/{stage}/{n}.json" for stage in ("spec-1", "spec.jso", "z") for n in range(30)):
            rig.run(rig.objects.put(key, b"{}"))
    rig.run(rig.objects.put(spec, b"damaged" * 100))
    known, calls = rig.run(lost_jobs(rig.manager.ports)), []
    assert known == []
    rig.run(rig.ledger.forget(names[:2]))
    page = rig.objects._page  # type: ignore[attr-defined]

    def counted(*args: Any) -> Any:
        calls.append(args)
        return page(*args)

    monkeypatch.setattr(rig.objects, "_page", counted)
    assert [lost.id for lost in rig.run(lost_jobs(rig.manager.ports))] == sorted(names[:2])
    assert len(calls) < 60


def test_request_whose_job_only_the_bucket_has_does_not_delete_a_retried_job(rig: Rig) -> None:
    """The request of the deletion was written, and then the ledger was lost. A retry was committed before the loss."""
    name = ended(rig, bad=(1,))
    rig.client.retry(name)
    rig.run(rig.objects.put(object_keys.deletion(name), json_format.deleted_job(name)))
    rig.run(rig.ledger.forget([name]))
    rig.manager.lives.pop(name)
    rig.run(deletion(rig).finish_interrupted())
    assert object_keys.deletion(name) not in objects_of(rig, name)
    rig.outstanding(name, 1)
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"


def test_request_whose_job_cannot_be_restored_is_dropped(rig: Rig) -> None:
    name = ended(rig)
    rig.run(rig.objects.put(object_keys.deletion(name), json_format.deleted_job(name)))
    rig.run(rig.objects.put(object_keys.spec(name), b"damaged"))
    rig.run(rig.ledger.forget([name]))
    before = objects_of(rig, name)
    with pytest.raises(NotFound):
        rig.client.delete(name)
    rig.run(deletion(rig).finish_interrupted())
    assert {*before} - {*objects_of(rig, name)} == {object_keys.deletion(name)}
