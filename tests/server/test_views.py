"""The view of a job, the admission of jobs, and the wake-up of watchers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Completion, JobId, JobState, StageCounts, StageName, TaskSet
from batchlab.core.ports import BundleRecord, JobRecord, StageRecord
from batchlab.core.protocol import object_keys
from batchlab.core.protocol.messages import Beat, HeldBundle
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.manager.admission import admit
from batchlab.manager.state import LiveJob, WorkerStatus
from batchlab.server.job_views import job_view, outcome_view

MAP, SUM = StageName("map"), StageName("sum")
JOB = JobDef(
    JobId("job-1"),
    "job",
    (StageDef(MAP, handler="m:f"), StageDef(SUM, after=(MAP,), gather="*", handler="m:g")),
    1.0,
    tags=(("team", "blue"),),
)
POOLS = {"default": 2, "gpu": 8}


def live_job(*bundles: Bundle) -> LiveJob:
    stages = {s.name: StageRecord(StageCounts(s.name, planned=9)) for s in JOB.stages}
    live = LiveJob(JobRecord(JOB, JobState.RUNNING), stages, version=7)
    live.add_outstanding((bundle, 0.0) for bundle in bundles)
    return live


def seen(*held: tuple[Bundle, bool]) -> WorkerStatus:
    told = tuple(HeldBundle("q", b.id, b.job, b.stage, b.id, running) for b, running in held)
    return WorkerStatus(Beat("w", "i", "default", 0.0, 2, 1, told, 1), 0.0, {})


def view(live: LiveJob, *workers: WorkerStatus) -> dict[str, Any]:
    return dict(job_view(live.record, list(live.stages.values()), live, workers))


# --- Jobs ----------------------------------------------------------------------------------------


def test_running_counts_the_tasks_of_bundles_that_run_each_once() -> None:
    one, two = (Bundle(JOB.id, MAP, TaskSet.span(*span)) for span in ((0, 3), (3, 4)))
    other = replace(one, job=JobId("other"))
    workers = [seen((one, True), (two, False)), seen((one, True), (other, True))]
    stages = view(live_job(one, two), *workers)["stages"]
    assert [stage["running"] for stage in stages] == [3, 0]


@pytest.mark.parametrize("state", list(JobState))
def test_job_with_a_running_task_is_not_starting(state: JobState) -> None:
    """The ledger has the state RUNNING only after the first bundle."""
    bundle = Bundle(JOB.id, MAP, TaskSet.span(0, 3))
    live = live_job(bundle)
    live.record = replace(live.record, state=state)
    waits = state in (JobState.RUNNABLE, JobState.STARTING)
    assert view(live, seen((bundle, True)))["state"] == ("RUNNING" if waits else state)
    assert view(live, seen((bundle, False)))["state"] == state


def test_bundle_with_an_outcome_is_not_running() -> None:
    bundle = Bundle(JOB.id, MAP, TaskSet.from_indices([1]))
    assert view(live_job(), seen((bundle, True)))["stages"][0]["running"] == 0


def test_an_ended_job_has_version_zero_and_a_live_one_its_own() -> None:
    live = live_job()
    assert view(live)["version"] == 7
    live.record = replace(live.record, state=JobState.FAILED)
    assert view(live)["version"] == 0


def test_stages_are_listed_in_job_order_with_their_pools() -> None:
    shown = view(live_job())
    assert [(s["name"], s["pool"]) for s in shown["stages"]] == [("map", "default"), ("sum", "default")]
    assert shown["tags"] == {"team": "blue"}


def test_outcome_names_the_tasks_in_its_object() -> None:
    bundle = Bundle(JOB.id, MAP, TaskSet.span(0, 10))
    good, bad = TaskSet.from_indices([0, 1, 2, 5]), TaskSet.from_indices([4])
    done = Completion(bundle, "w", 0.0, 1.0, good, bad, TaskSet(), 1.0)
    shown = outcome_view(BundleRecord(bundle, done, 3), UNSEALED)
    assert shown["tasks"] == [(0, 3), (5, 6)]
    assert (shown["failed"], shown["key"]) == (1, object_keys.outcome(bundle, UNSEALED))


def test_a_bundle_without_an_outcome_has_no_view() -> None:
    with pytest.raises(ValueError, match="does not have an outcome"):
        outcome_view(BundleRecord(Bundle(JOB.id, MAP, TaskSet.from_indices([1]))), UNSEALED)


# --- Admission -----------------------------------------------------------------------------------


def with_stage(**changes: Any) -> JobDef:
    return replace(JOB, stages=(replace(JOB.stages[0], **changes), JOB.stages[1]))


REFUSED: dict[str, tuple[JobDef, str]] = {
    "no stages": (replace(JOB, stages=()), "does not have stages"),
    "an id that leaves its folder": (replace(JOB, id=JobId("../x")), "cannot name a job"),
    "a stage that leaves its folder": (with_stage(name=StageName("a/b")), "cannot name"),
    "an unknown pool": (with_stage(pool="cpu"), "Its pools are default, gpu"),
    "too many slots": (with_stage(slots=3), "asks for 3 slots per task, but an instance"),
    "no slots": (with_stage(slots=0), "asks for 0 slots"),
    "a stage after nothing": (with_stage(after=(StageName("x"),)), "not an earlier stage"),
    "a stage after itself": (with_stage(after=(MAP,)), "not an earlier stage"),
    "a name twice": (with_stage(name=SUM), "Two stages are named 'sum'"),
    "two things to run": (with_stage(command=("true",)), "either a handler or a command"),
    "nothing to run": (with_stage(handler=None), "either a handler or a command"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_job_that_could_never_run_is_refused(name: str) -> None:
    """A job that cannot run must not wait forever."""
    job, message = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        admit(job, POOLS)
    assert message in str(caught.value)
    assert caught.value.remedy


def test_a_job_that_fits_is_admitted() -> None:
    admit(JOB, POOLS)
    admit(with_stage(pool="gpu", slots=8, handler=None, command=("true",)), POOLS)


# --- News ----------------------------------------------------------------------------------------


def test_every_watcher_wakes_at_a_change_and_none_without() -> None:
    async def scene() -> None:
        live = live_job()
        watchers = [asyncio.create_task(live.wait_for_change(7)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(watcher.done() for watcher in watchers)
        live.notify()
        await asyncio.wait_for(asyncio.gather(*watchers), 1)
        late = asyncio.create_task(live.wait_for_change(8))
        await asyncio.sleep(0)
        assert not late.done()
        live.notify()
        await asyncio.wait_for(late, 1)

    asyncio.run(scene())


def test_earlier_change_is_reported_at_once() -> None:
    async def scene() -> None:
        live = live_job()
        live.notify()
        await asyncio.wait_for(live.wait_for_change(7), 1)

    asyncio.run(scene())


# --- Cost ----------------------------------------------------------------------------------------


def test_a_client_loads_neither_a_command_line_nor_a_validation_library() -> None:
    """Every command loads the modules that the client imports."""
    code = (
        "import sys\n"
        "from batchlab.client.http import Client\n"
        "assert 'httpx' not in sys.modules\n"
        "Client('http://127.0.0.1:1', 'token').close()\n"
        "import batchlab.core.api_types\n"
        "unwanted = {'click', 'rich', 'pydantic', 'fastapi', 'sqlalchemy', 'asyncio'}\n"
        "print(*sorted(unwanted & sys.modules.keys()))\n"
        "import httpx._main\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
