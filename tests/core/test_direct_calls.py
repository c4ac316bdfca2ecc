"""The messages and replies of direct calls."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from random import Random

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.core.commit import commit
from batchlab.core.direct_calls import MAX_REPLY_BYTES, Caller, CommittedCall, outcome_in, reply_to
from batchlab.core.errors import AlreadyExists, Malformed
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import JobId, Outcome, Ran, StageName
from batchlab.core.port_retries import Patience
from batchlab.core.ports import QueueSpec
from batchlab.core.protocol import commit_keys, json_format, object_keys, settlement
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.core.protocol.messages import read_task_message
from batchlab.core.protocol.object_keys import CommitKey, opens, proof, summary
from batchlab.core.retry_rule import RetryRule
from batchlab.sim.actors import SimClock, SimIds
from batchlab.sim.event_loop import SimLoop
from batchlab.sim.world import EPOCH_S

JOB = JobDef(
    JobId("call-1"), "call", (StageDef(StageName("map"), handler="m:f", retry=RetryRule(attempts=1)),), 1.0, items=1
)
OTHER = CommitKey("0" * 32)


def outcome_of(call: CommittedCall, value: str) -> Outcome:
    return settlement.settle(
        JOB, call.bundle, [Ran(0, 0.1, value)], execution="w-1", worker="w", started_s=1.0, ended_s=2.0
    )


def in_loop(check: Callable[[SimLoop], Coroutine[None, None, None]]) -> None:
    loop = SimLoop()
    try:
        loop.run_until_complete(check(loop))
    finally:
        loop.close()


async def begun(loop: SimLoop) -> tuple[CommittedCall, SimObjects, SimQueue]:
    objects, clock = SimObjects(), SimClock(loop, EPOCH_S)
    queue = SimQueue(clock, Random(0))
    await queue.ensure(QueueSpec(object_keys.tasks_queue("default")))
    keys = CommitKeys(objects, ids=SimIds(Random(0)))
    await keys.ensure()
    caller = Caller(objects, queue, keys, clock)
    call = await caller.commit(JOB, [7], "a1")
    await caller.send(call)
    with pytest.raises(AlreadyExists):
        await caller.commit(JOB, [7], "a1")
    return call, objects, queue


def test_the_definition_and_the_message_of_a_call_agree() -> None:
    async def check(loop: SimLoop) -> None:
        call, objects, queue = await begun(loop)
        doc = json_format.loads(await objects.get(object_keys.spec(JOB.id)))
        job, opening = commit_keys.from_json(doc)
        assert opens(call.key, job)
        assert opening
        assert opening.cut
        assert (opening.items, opening.cut.bundles, opening.cut.planned) == ([7], (call.bundle,), 1)
        (message,) = await queue.receive(object_keys.tasks_queue("default"))
        task = read_task_message(message.body)
        assert (task.bundle, task.items, task.key, task.reply) == (call.bundle, [7], call.key, "a1")

    in_loop(check)


def test_a_reply_counts_only_with_the_key_of_its_call() -> None:
    async def check(loop: SimLoop) -> None:
        call, objects, _ = await begun(loop)
        patience = Patience(Random(0), limit_s=0.0)

        async def read(reply: str) -> Outcome | None:
            return await outcome_in(reply, call, objects, patience)

        small, large = outcome_of(call, "x"), outcome_of(call, "€" * (MAX_REPLY_BYTES // 2))
        assert await read(reply_to(small, call.key)) == small
        assert len(reply_to(large, call.key).encode()) < MAX_REPLY_BYTES
        assert await read(reply_to(large, call.key)) is None
        await commit(objects, large, patience, call.key)
        assert await read(reply_to(large, call.key)) == large
        assert await read(reply_to(small, OTHER)) is None
        assert await read(reply_to(small, call.key).replace('"x"', '"y"')) is None
        for text in ("", "x", f"{'0' * 32} {{}}"):
            assert await read(text) is None
        other = replace(small, bundle=replace(call.bundle, job=JobId("call-2")))
        for text in ("{}", "../grid/commit-secret.json", json_format.outcome_text(other)):
            with pytest.raises(Malformed):
                await read(f"{proof(call.key, summary(text))} {text}")

    in_loop(check)
