"""A worker without the commit key of a job cannot change that job."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.commit import Addressed, address, committed
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, JobId, Json, Outcome, Ran, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import QueueSpec
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.object_keys import UNSEALED, CommitKey, seal
from batchlab.core.service_settings import WorkerSettings
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from batchlab.worker.inflight_message import Handle, Identity, Work
from batchlab.worker.loop import Worker
from batchlab.worker.poison_detection import marker
from tests.support.attacks.victim import Victim, messages_left
from tests.support.attacks.worker_rights import worker_of
from tests.support.grid.fixtures import Bring
from tests.support.grid.local_grid import LocalGrid
from tests.support.waiting import until

OTHER_KEY = CommitKey("0f" * 16)
WORK = StageName("work")
TASKS = object_keys.tasks_queue("default")


def forged(bundle: Bundle, value: int) -> bytes:
    """Return an outcome of a bundle with a made-up result."""
    made = Outcome(bundle, "evil-1", "evil", 1.0, 2.0, bundle.tasks, (value,), (0.1,))
    return json_format.outcome_text(made).encode()


def test_forged_outcomes_of_another_job_are_not_counted(bring_up: Bring, tmp_path: Path) -> None:
    """The manager, the workers, and a rebuild of the ledger ignore outcome objects without the seal of their job."""
    grid = bring_up()
    victim = Victim(grid, tmp_path / "victim")
    victim.submit()
    with worker_of(grid) as worker:
        for task in range(victim.tasks):
            for key in (UNSEALED, OTHER_KEY):
                bundle = victim.bundle(task)
                worker.put(object_keys.outcome(bundle, key), forged(bundle, -1), if_absent=True)
    victim.open_gate()
    victim.check(tmp_path / "results")
    before = grid.client.job(victim.id)
    grid.client.rebuild()
    after = grid.client.job(victim.id)
    assert (after["state"], after["stages"]) == (before["state"], before["stages"])


def test_forged_messages_of_another_job_are_dropped(bring_up: Bring, tmp_path: Path) -> None:
    """A worker does not run a message without the commit key of its job, even if the message contains a definition of
    the job."""
    grid = bring_up()
    victim = Victim(grid, tmp_path / "victim")
    victim.submit()
    touched = tmp_path / "touched"
    with worker_of(grid) as worker:
        spec = json_format.loads(worker.get(object_keys.spec(victim.id)))
        evil = StageDef(victim.bundle(0).stage, command=("touch", str(touched)))
        job = replace(json_format.job_from_json(spec), stages=(evil,), commit_hash="")
        for key in (UNSEALED, OTHER_KEY):
            sent = address(job, victim.bundle(0), key, items=[0], now_s=1.0)
            doc = json_format.loads(sent.message.body)
            worker.send(sent.queue, json_format.dumps(doc))
            worker.send(sent.queue, json_format.dumps({**doc, "job": json_format.job_to_json(job)}))
        victim.open_gate()
    until(lambda: messages_left(grid) == 0)
    victim.check(tmp_path / "results")
    assert not touched.exists()


def test_worker_of_one_job_cannot_change_another_job_on_ministack(bring_up: Bring, tmp_path: Path) -> None:
    """A worker with the commit key of its own job forges outcomes of another job, swaps the jobs in task messages, and
    replays messages of both jobs after their ends. The test uses the real S3 and SQS APIs."""
    grid = bring_up(backend="ministack")
    jobs = {name: Victim(grid, tmp_path / name) for name in ("victim", "own")}
    keys = {name: key_of(grid, one.submit(name, name)) for name, one in jobs.items()}
    with worker_of(grid) as worker:
        specs = {
            name: json_format.job_from_json(json_format.loads(worker.get(object_keys.spec(one.id))))
            for name, one in jobs.items()
        }

        def message(job: str, task: int, key: CommitKey, item: int) -> Addressed:
            return address(specs[job], jobs[job].bundle(task), key, items=[item], now_s=1.0)

        for task in range(3):
            bundle = jobs["victim"].bundle(task)
            own = jobs["own"].bundle(task)
            worker.put(object_keys.outcome(bundle, keys["own"]), forged(bundle, -1), if_absent=True)
            worker.put(object_keys.outcome(bundle, UNSEALED), forged(own, -1), if_absent=True)
            for job, other in (("victim", "own"), ("own", "victim")):
                sent = message(job, task, keys[other], -1)
                worker.send(sent.queue, sent.message.body)
        for one in jobs.values():
            one.open_gate()
        for name, one in jobs.items():
            one.check(tmp_path / f"results-{name}")
        until(lambda: messages_left(grid) == 0)
        ended = {name: grid.client.job(one.id) for name, one in jobs.items()}
        for name in jobs:
            sent = message(name, 0, keys[name], -1)
            worker.send(sent.queue, sent.message.body)
        until(lambda: messages_left(grid) == 0)
    for name, one in jobs.items():
        after = grid.client.job(one.id)
        assert (after["state"], after["stages"]) == (ended[name]["state"], ended[name]["stages"])
        results = grid.results(after, tmp_path / f"again-{name}")
        assert results["triple"] == [0, 3, 6]


def key_of(grid: LocalGrid, job: JobId) -> CommitKey:
    """Return the commit key that a worker of the job has."""
    return asyncio.run(CommitKeys(grid.objects).stored(job))


# --- In virtual time -----------------------------------------------------------------------------


class Doing:
    """A runner that returns the item of each task as its result."""

    def __init__(self) -> None:
        self.ran: list[BundleRun] = []

    async def run(self, work: Work, handle: Handle) -> AsyncIterator[Ran]:
        self.ran.append((work.job.id, work.bundle.id))
        for task, item in zip(work.bundle.tasks, work.items, strict=True):
            yield Ran(task, 0.1, item)

    async def close(self) -> None: ...


BundleRun = tuple[str, str]


class Scene:
    """A worker with its bucket and queues, and a job of one task with a commit key."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.clock = SimClock(asyncio.get_running_loop(), 1_700_000_000.0)
        self.objects, self.queue = SimObjects(), SimQueue(self.clock, rng)
        self.patience, self.runner = Patience(rng), Doing()
        self.keys = CommitKeys(self.objects, self.patience, SimIds(rng))
        ports = self.objects, self.queue, self.clock, self.runner, self.patience
        self.worker = Worker(Identity("w-1", "i-1", "default", 1), *ports, WorkerSettings())

    async def prepare(self, name: str = "victim-1") -> tuple[JobDef, CommitKey]:
        """Store a job with a commit key."""
        for queue in (object_keys.EVENTS, TASKS):
            await self.queue.ensure(QueueSpec(queue))
        plain = JobDef(JobId(name), "victim", (StageDef(WORK, handler="m:f"),), 1.0, items=1)
        job = await self.keys.seal(plain)
        await self.objects.put(object_keys.spec(job.id), commit_keys.to_bytes(job))
        return job, await self.keys.key_of(job)


def test_forged_start_markers_do_not_count_against_tasks_of_another_job() -> None:
    """Start markers without the seal of a job do not count as starts of its tasks."""

    async def main() -> None:
        scene = Scene()
        job, key = await scene.prepare()
        bundle = Bundle(job.id, WORK, TaskSet.from_indices([0]), losses=1)
        for number in range(3):
            for sealed in ("", f".{'0f' * 16}", f".{seal(OTHER_KEY, 'start')}"):
                name = f"{object_keys.starts(bundle)}evil{number}-1{sealed}"
                await scene.objects.put(name, marker("evil", 1.0, name, OTHER_KEY))
        sent = address(job, bundle, key, items=[7], now_s=1.0)
        await scene.queue.send(sent.queue, [sent.message])
        running = asyncio.create_task(scene.worker.run())
        await asyncio.sleep(10 * WorkerSettings().visibility_s)
        scene.worker.drain()
        await running
        outcome = await committed(scene.objects, bundle, scene.patience, key)
        assert outcome
        assert (outcome.values, outcome.failed) == ((7,), ())

    SimLoop().run(main())


def test_a_forged_running_marker_does_not_keep_a_bundle_from_being_run_again() -> None:
    """A running marker with unsealed content is ignored, although a listing of the bucket contains its name."""

    async def main() -> None:
        scene = Scene()
        job, key = await scene.prepare()
        bundle = Bundle(job.id, WORK, TaskSet.from_indices([0]))
        name = object_keys.running(bundle, key)
        later_s = scene.clock.now_s() + 10_000.0
        await scene.objects.put(name, marker("evil", later_s, name, OTHER_KEY))
        sent = address(job, bundle, key, items=[7], now_s=1.0, watchdog=True)
        await scene.queue.send(sent.queue, [sent.message])
        running = asyncio.create_task(scene.worker.run())
        await asyncio.sleep(10.0)
        scene.worker.drain()
        await running
        assert scene.runner.ran == [(job.id, bundle.id)]

    SimLoop().run(main())


def test_a_message_runs_under_the_key_of_its_own_job_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The commit key of one job does not open another job, and a cached job of the worker does not let a later message
    pass."""
    caplog.set_level(logging.WARNING, "batchlab")

    async def main() -> None:
        scene = Scene()
        job, key = await scene.prepare()
        other, its_key = await scene.prepare("other-1")
        tries = [(job, key, 0), (job, its_key, 1), (job, UNSEALED, 2), (other, key, 3)]
        running = asyncio.create_task(scene.worker.run())
        for one, with_key, task in tries:
            bundle = Bundle(one.id, WORK, TaskSet.from_indices([task]))
            sent = address(one, bundle, with_key, items=[task], now_s=1.0)
            await scene.queue.send(sent.queue, [sent.message])
            await asyncio.sleep(1.0)
        scene.worker.drain()
        await running
        assert scene.runner.ran == [(job.id, Bundle(job.id, WORK, TaskSet.from_indices([0])).id)]
        assert caplog.text.count("does not have its commit key") == 3
        depth = await scene.queue.depth(TASKS)
        assert depth.visible + depth.in_flight + depth.delayed == 0

    SimLoop().run(main())


def test_a_key_of_a_spec_that_a_worker_wrote_opens_no_job() -> None:
    """A definition below the markers of another job is not the definition of the job with that id."""

    async def main() -> None:
        scene = Scene()
        job, key = await scene.prepare()
        name = JobId(f"{job.id}/work/running/x")
        await scene.objects.put(object_keys.spec(name), commit_keys.to_bytes(job))
        bundle = Bundle(name, WORK, TaskSet.from_indices([0]))
        sent = address(job, bundle, key, items=[7], now_s=1.0)
        await scene.queue.send(sent.queue, [sent.message])
        running = asyncio.create_task(scene.worker.run())
        await asyncio.sleep(5.0)
        scene.worker.drain()
        await running
        assert not scene.runner.ran

    SimLoop().run(main())


@pytest.mark.parametrize("odd", [{"f": "00000000-00000000.0.1"}, {"r": 10**9}])
def test_an_impossible_bundle_ends_no_worker(odd: Mapping[str, Json]) -> None:
    """A worker sends a message with the right commit key and an impossible bundle. The bundle has a source in a stage
    without an upstream stage, or a round that the job never reaches. Before, the first message ended each worker with
    an error, and the second made each worker look for the plans of 10⁹ rounds."""

    async def main() -> None:
        scene = Scene()
        job, key = await scene.prepare()
        bundle = Bundle(job.id, WORK, TaskSet.from_indices([0]))
        right = address(job, bundle, key, now_s=1.0).message
        doc = json.loads(right.body)
        doc["b"] |= odd
        good = address(job, bundle, key, items=[7], now_s=1.0).message
        await scene.queue.send(TASKS, [replace(right, body=json.dumps(doc)), good])
        running = asyncio.create_task(scene.worker.run())
        await asyncio.sleep(10.0)
        assert not running.done()
        scene.worker.drain()
        await running
        assert scene.runner.ran == [(job.id, bundle.id)]

    SimLoop().run(main(), limit_steps=1_000_000)
