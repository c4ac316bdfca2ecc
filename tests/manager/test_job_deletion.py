"""Deletion of ended jobs, and its recovery after a crash between any two of its writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from batchlab.core.errors import NotFound, Refused
from batchlab.core.model import JobId
from batchlab.core.protocol import json_format, object_keys
from batchlab.manager.job_deletion import JobDeletion
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
    return JobDeletion(rig.manager.context, lambda _: False)


def is_gone(rig: Rig, name: JobId) -> bool:
    """Return whether only the note about the deletion is left of the job."""
    spec = object_keys.spec(name)
    if objects_of(rig, name) != [spec] or name in [view["id"] for view in rig.client.jobs()]:
        return False
    return rig.run(rig.objects.get(spec)) == json_format.deleted_job(name)


def test_deleted_job_leaves_only_a_note(rig: Rig) -> None:
    name, other = ended(rig, bad=(1,)), ended(rig, "other")
    before = objects_of(rig, other)
    assert len(rig.client.failures(name)) == 1
    count = len(objects_of(rig, name))
    assert rig.client.delete(name) == {"id": name, "objects": count - 1}
    assert is_gone(rig, name)
    assert objects_of(rig, other) == before
    for call in (rig.client.job, rig.client.failures, rig.client.retry, rig.client.delete):
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


def test_job_whose_schedule_waits_for_its_end_is_kept(rig: Rig) -> None:
    name = ended(rig)
    awaited = JobDeletion(rig.manager.context, lambda job: job == name)
    with pytest.raises(Refused, match="has not recorded the end"):
        rig.run(awaited.delete(name))
    assert rig.client.job(name)["state"] == "SUCCEEDED"


def test_retry_that_another_manager_has_begun_prevents_the_deletion(rig: Rig) -> None:
    name = ended(rig, bad=(1,))
    plan = rig.run(rig.manager.job_commands._retries.plan(rig.run(rig.ledger.job(name)), None))
    rig.run(rig.objects.put(object_keys.retry(name, 1), plan.to_bytes()))
    with pytest.raises(Refused, match="is retried at the moment"):
        rig.client.delete(name)
    assert object_keys.deletion(name) not in objects_of(rig, name)
    assert rig.client.job(name)["state"] == "FAILED"


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
            assert writes > 8
            return
        if not has_begun and name in states:
            rig.client.delete(name)
        assert is_gone(rig, name), writes
    pytest.fail("the deletion did not end")
