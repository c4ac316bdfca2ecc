"""A bucket that is empty after a restart, as LocalStack's is, while the ledger still has its content."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchlab.core.model import JobId
from batchlab.core.protocol import object_keys
from tests.support.server.api import Rig, job


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def empty(rig: Rig) -> None:
    """Delete every object."""

    async def remove() -> None:
        keys = [info.key async for page in rig.objects.list("") for info in page]
        await rig.objects.delete(keys)

    rig.run(remove())


def test_the_same_job_runs_again_once_the_bucket_has_lost_it(rig: Rig) -> None:
    first = rig.submit(job())
    rig.work(first, 4)
    assert rig.ended(first)["state"] == "SUCCEEDED"
    empty(rig)
    assert rig.submit(job()) == first
    assert rig.client.job(first)["ended_s"] is None, "the bucket wins"
    rig.work(first, 4)
    view = rig.ended(first)
    assert view["state"] == "SUCCEEDED"
    assert [(stage["planned"], stage["succeeded"]) for stage in view["stages"]] == [(4, 4)]


def test_a_job_that_the_bucket_lost_while_it_ran_can_be_submitted_again(rig: Rig) -> None:
    first = rig.submit(job())
    rig.outstanding(first, 4)
    empty(rig)
    rig.run(rig.manager._end_lost_jobs())
    view = rig.ended(first)
    assert (view["state"], "submit the job again" in view["reason"]) == ("FAILED", True)
    assert rig.submit(job()) == first
    rig.work(first, 4)
    assert rig.ended(first)["state"] == "SUCCEEDED"


def test_the_same_job_is_not_run_twice_while_the_bucket_has_it(rig: Rig) -> None:
    first = rig.submit(job())
    rig.work(first, 4)
    ended_s = rig.ended(first)["ended_s"]
    assert rig.submit(job()) == first
    assert rig.client.job(first)["ended_s"] == ended_s
    assert JobId(first) not in rig.manager.lives
    assert rig.run(rig.objects.head(object_keys.spec(JobId(first))))


def test_bundle_that_a_worker_commits_after_the_end_of_a_lost_job_counts_once(rig: Rig) -> None:
    first = rig.submit(job())
    found = rig.outstanding(first, 4)
    live = rig.manager.lives[JobId(first)]
    empty(rig)
    rig.run(rig.manager._end_lost_jobs())
    rig.ended(first)
    rig.run(rig._work(live, found, ()))
    rig.until(lambda: rig.manager.counts.repeated >= 4, "the late completions")
    view = rig.client.job(first)
    assert [(stage["planned"], stage["succeeded"], stage["cancelled"]) for stage in view["stages"]] == [(4, 0, 4)]
