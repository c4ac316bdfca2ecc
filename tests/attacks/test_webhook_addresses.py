"""The address of a job's webhook, which often contains a secret and which workers cannot read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.core.errors import Refused, UsageError
from batchlab.core.job_definition import JobDef, NotifyDef
from batchlab.core.model import JobId
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.runtime import manager_process
from tests.support.grid.local_grid import LocalGrid
from tests.support.server.api import Rig, job

SECRET = "T0KEN-in-a-path"
HOOK = NotifyDef("webhook", f"https://hooks.example.org/services/{SECRET}", ("ended",))
TOPIC = NotifyDef("sns", "arn:aws:sns:eu-central-1:123456789012:batch", ("failed",))


def told(name: str) -> JobDef:
    return replace(job(name, token=name), notify=(TOPIC, HOOK))


@pytest.mark.slow
def test_no_object_that_a_worker_reads_has_the_address(tmp_path: Path) -> None:
    """A worker may read every object of the bucket except `grid/*`."""
    grid = LocalGrid(tmp_path / "home")
    try:
        view = grid.client.submit(told("sums"))
        state = grid.wait(view["id"])["state"]
        manager_process.kill_manager(grid.home)
        grid.client.close()
        grid.start()
        assert grid.client.job(view["id"])["state"] == state
    finally:
        grid.stop()
    found = [
        path.relative_to(grid.home.objects).as_posix()
        for path in grid.home.objects.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert found
    assert [one for one in found if not one.startswith("grid/")] == []
    queue = grid.home.queue_file.read_bytes()
    assert SECRET.encode() not in queue


def spec_of(rig: Rig, name: str) -> JobDef:
    return json_format.job_from_json(json_format.loads(rig.run(rig.objects.get(object_keys.spec(JobId(name))))))


def test_rebuilt_ledger_keeps_the_address(rig: Rig) -> None:
    """The ledger is rebuilt from the bucket alone, and notifications need the address."""
    name = JobId(rig.client.submit(told("again"))["id"])
    assert rig.client.rebuild() == 1
    known = rig.run(rig.ledger.job(name)).job
    assert known.notify == (TOPIC, HOOK)


def test_the_same_submission_again_is_the_same_job(rig: Rig) -> None:
    """A client may repeat a submission with the definition that the client has read from the bucket. The manager still
    returns the same job."""
    first = rig.client.submit(told("same"))
    assert rig.client.submit(told("same"))["id"] == first["id"]
    spec = spec_of(rig, first["id"])
    assert SECRET not in str(spec)
    assert rig.client.submit(spec)["id"] == first["id"]
    other = replace(told("same"), notify=(replace(HOOK, to="https://hooks.example.org/other"),))
    with pytest.raises(Refused, match="is another one"):
        rig.client.submit(other)


def test_job_cannot_name_the_address_of_another_job(rig: Rig) -> None:
    """Only the manager creates references to addresses."""
    first = rig.client.submit(told("first"))
    spec = spec_of(rig, first["id"])
    with pytest.raises(UsageError, match="webhook's address is not a URL"):
        rig.client.submit(replace(job("second", token="second"), notify=spec.notify))


def test_a_spec_of_the_first_release_is_read_as_before(rig: Rig) -> None:
    """The first release stored addresses in the definition itself."""
    old = replace(told("old"), max_failures=0.0)  # the API reads the job in this form
    rig.run(rig.objects.put(object_keys.spec(old.id), commit_keys.to_bytes(old)))
    assert rig.client.rebuild() == 1
    assert rig.run(rig.ledger.job(old.id)).job.notify == (TOPIC, HOOK)
    assert rig.client.submit(old)["id"] == old.id


def test_lost_address_does_not_block_the_end_of_a_job(rig: Rig) -> None:
    """If the object of an address reference does not exist, no notification is sent."""
    name = JobId(rig.client.submit(told("lost"))["id"])

    async def lose() -> None:
        keys = [one.key async for page in rig.objects.list("grid/addresses/") for one in page]
        await rig.objects.delete(keys)

    rig.run(lose())
    assert rig.client.rebuild() == 1
    (_, hook) = rig.run(rig.ledger.job(name)).job.notify
    assert hook.to.startswith("grid:")
    # The job's input does not exist, so the job fails.
    assert rig.ended(name)["state"] == "FAILED"
