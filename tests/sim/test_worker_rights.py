"""The simulated worker, which has exactly the rights of a worker's role on AWS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from batchlab.core.ports import Outgoing
from batchlab.core.protocol import object_keys
from batchlab.sim import worker_rights
from batchlab.sim.actors import Actor, Violated
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.port_wrappers import wrap
from batchlab.sim.worker_rights import AccessDenied, Rights
from batchlab.sim.world import World
from tests.support.aws import cfn
from tests.support.aws.stack_shapes import SHAPES
from tests.support.sim import scenes

BUCKET = "<Bucket.Arn>/"
ROLE = cfn.Rendered(cfn.load(), **next(iter(SHAPES.values()))).of_type("AWS::IAM::Role")["PoolRole"]


def keys_of(action: str) -> set[str]:
    """Return the key patterns for which the template's worker role allows an S3 action."""
    return {
        resource.removeprefix(BUCKET)
        for statement in cfn.statements(ROLE)
        if statement["Effect"] == "Allow" and action in cfn.as_list(statement["Action"])
        for resource in cfn.as_list(statement["Resource"])
        if resource.startswith(BUCKET)
    }


def test_the_rights_are_those_of_the_stack_template() -> None:
    assert keys_of("s3:GetObject") == set(worker_rights.READS)
    assert keys_of("s3:PutObject") == set(worker_rights.WRITES)
    assert not keys_of("s3:DeleteObject")


CALLS: list[tuple[str, Callable[[Any, Any], Awaitable[Any]]]] = [
    ("read the grid's state", lambda o, _: o.get("grid/notifications.json")),
    ("read logs", lambda o, _: o.head("logs/a/b")),
    ("write a spec", lambda o, _: o.put("jobs/a/spec.json", b"")),
    ("write a word", lambda o, _: o.put("jobs/a/control.json", b"")),
    ("write a plan", lambda o, _: o.put("jobs/a/b/plan/0000/manifest.json", b"", if_absent=True)),
    ("write an end", lambda o, _: o.put("jobs/a/final/0000.json", b"", if_absent=True)),
    ("replace an outcome", lambda o, _: o.put("jobs/a/b/outcomes/x.json", b"")),
    ("replace a start marker", lambda o, _: o.put("jobs/a/b/starts/x/w-1", b"")),
    ("delete an outcome", lambda o, _: o.delete(["jobs/a/b/outcomes/x.json"])),
    ("delete a start marker", lambda o, _: o.delete(["jobs/a/b/starts/x/w-1"])),
    ("receive tasks of another pool", lambda _, q: q.receive("tasks-b", wait_s=0.0)),
    ("delete tasks of another pool", lambda _, q: q.delete("tasks-b", ["receipt"])),
    ("receive events", lambda _, q: q.receive("events", wait_s=0.0)),
    ("receive dead letters", lambda _, q: q.receive("tasks-a-dead", wait_s=0.0)),
    ("send dead letters", lambda _, q: q.send("tasks-a-dead", [Outgoing("")])),
    ("purge", lambda _, q: q.purge("tasks-a")),
    ("measure", lambda _, q: q.depth("tasks-a")),
]


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
def test_a_call_outside_the_rights_is_refused(call: Callable[[Any, Any], Awaitable[Any]]) -> None:
    denied: list[str] = []

    async def main() -> None:
        world = World(1, (), script=scenes.takes(1.0), sql=False)
        actor, allowed = Actor("worker-x"), Rights(denied.append, "a")
        objects = wrap(world.objects, "objects", actor, None, world.log, None, allowed)
        queue = wrap(world.queue, "queue", actor, None, world.log, None, allowed)
        with pytest.raises(AccessDenied):
            await call(objects, queue)

    SimLoop(inline_executor=True).run(main())
    assert len(denied) == 1


def test_an_honest_worker_that_exceeds_its_role_fails_the_world() -> None:
    async def act(world: World) -> None:
        await scenes.submitted(world, scenes.job(scenes.stage(scenes.A)))
        while not world.workers:
            await asyncio.sleep(1.0)
        worker = next(iter(world.workers.values()))
        call = worker.worker.context.objects.put(object_keys.control(scenes.job().id), b"")
        await asyncio.wait([worker.actor.spawn(call)])
        await asyncio.sleep(1.0)

    with pytest.raises(Violated, match="role is violated"):
        scenes.in_world(act, script=scenes.takes(1.0))
