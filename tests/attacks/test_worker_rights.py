"""The attacker of the other tests, who has exactly the rights of a worker."""

from __future__ import annotations

import pytest

from batchlab.core.errors import AlreadyExists
from batchlab.core.protocol import object_keys
from tests.support.attacks.worker_rights import Forbidden, WorkerRights, worker_of
from tests.support.grid.fixtures import Bring
from tests.support.server.api import Rig, job
from tests.support.waiting import until

JOB = "sums-0123456789"
WRITES = (
    f"files/{JOB}/x",
    f"logs/{JOB}/x.log",
    f"jobs/{JOB}/map/outcomes/aa/x.json",
    f"jobs/{JOB}/map/running/x.json",
    f"jobs/{JOB}/map/starts/x",
)
WRITE_ONCE = (f"files/{JOB}/x", f"logs/{JOB}/x.log", f"jobs/{JOB}/map/outcomes/aa/x.json", f"jobs/{JOB}/map/starts/x")
NOT_WRITTEN = (
    f"jobs/{JOB}/spec.json",
    f"jobs/{JOB}/control.json",
    f"jobs/{JOB}/map/plan/0000/manifest.json",
    f"jobs/{JOB}/final/0000.json",
    f"raw/{JOB}/x",
    "code/x.zip",
    "grid/commit-secret.json",
    f"reports/{JOB}/x",
)


def test_worker_can_write_only_its_own_prefixes(worker: WorkerRights) -> None:
    for key in WRITES:
        worker.put(key, b"x", if_absent=True)
        with pytest.raises(AlreadyExists):
            worker.put(key, b"y", if_absent=True)
        with pytest.raises(Forbidden):
            worker.remove(key)
        if key.startswith("files/") or "/outcomes/" in key or "/running/" in key:
            assert worker.get(key) == b"x"
    for key in NOT_WRITTEN:
        with pytest.raises(Forbidden):
            worker.put(key, b"x")
        with pytest.raises(Forbidden):
            worker.remove(key)
    for key in ("grid/commit-secret.json", f"reports/{JOB}/x", f"logs/{JOB}/x.log"):
        with pytest.raises(Forbidden):
            worker.get(key)
    listed = [key for key in worker.list("") if not key.startswith("grid/")]
    assert sorted(listed) == sorted(WRITES)
    for key in WRITE_ONCE:
        with pytest.raises(Forbidden):
            worker.put(key, b"y")


def test_a_worker_uses_task_queues_and_only_sends_events(rig: Rig, worker: WorkerRights) -> None:
    rig.submit(job(tasks=1))
    rig.outstanding(rig.client.jobs(limit=1)[0]["id"], 1)
    tasks = object_keys.tasks_queue("default")
    (message,) = worker.receive(tasks, wait_s=5.0)
    worker.release(tasks, message.receipt)
    (again,) = worker.receive(tasks, wait_s=5.0)
    worker.delete(tasks, again.receipt)
    worker.send(tasks, again.body)
    worker.send_events("{}")
    others = (object_keys.EVENTS, object_keys.dead_letters("default"), object_keys.tasks_queue("gpu"), "other")
    for queue in others:
        with pytest.raises(Forbidden):
            worker.receive(queue)
    with pytest.raises(Forbidden):
        worker.send(object_keys.dead_letters("default"), "{}")


@pytest.mark.parametrize("backend", ["local", "ministack"])
def test_a_real_grid_can_be_attacked(bring_up: Bring, backend: str) -> None:
    grid = bring_up(backend=backend)
    until(lambda: grid.client.health()["leader"])  # the leader has created the queues
    with worker_of(grid) as worker:
        worker.put(f"files/{JOB}/x", b"x", if_absent=True)
        assert worker.list("files/") == [f"files/{JOB}/x"]
        worker.send_events('{"v":1}')
        with pytest.raises(Forbidden):
            worker.put(f"jobs/{JOB}/spec.json", b"x")
    assert grid.client.jobs() == []
