"""Notifications of a job's end, which are repeated until they are delivered, by any leader."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from batchlab.core.errors import NotFound, Unreachable
from batchlab.core.job_definition import NotifyDef
from batchlab.core.notifications import NotDelivered, Notification, Target
from batchlab.core.protocol import object_keys
from batchlab.manager.notifier import GIVE_UP_S, MAX_PENDING
from tests.support.manager.notifier import ENDING, EPOCH_S, OPS, Scene, a_job, a_notification, play

# --- Ends ----------------------------------------------------------------------------------------


def test_end_is_stored_before_the_job_continues() -> None:
    async def main() -> None:
        scene = Scene(OPS, replace(OPS, name="happy", on=("succeeded",)))
        live = a_job(succeeded=8, failed=2)
        await scene.manager().ended(live, ENDING)  # the manager dies after this call
        (kept,) = (await scene.kept())["pending"]
        assert (kept["target"], kept["moment"]) == ("ops", "failed")
        await scene.led(scene.manager(), 1.0)
        ((_, one),) = scene.tried
        assert json.loads(one.body) == {
            "v": 1,
            "id": one.id,
            "moment": "failed",
            "at_s": ENDING.ended_s,
            "job": {
                "id": "sums-1",
                "name": "sums",
                "state": "FAILED",
                "reason": "2 tasks failed",
                "round": 0,
                "tags": {"team": "blue"},
                "submitted_s": EPOCH_S,
                "ended_s": ENDING.ended_s,
            },
            "tasks": {"planned": 10, "succeeded": 8, "failed": 2, "cancelled": 0},
        }
        after = await scene.kept()
        assert after["pending"] == []
        assert after["log"][0]["state"] == "delivered"
        assert scene.counts.deliveries["webhook", "delivered"] == 1

    play(main)


def test_repeated_end_is_the_same_notification() -> None:
    """A leader may die between the write to the bucket and the write to the ledger. The next leader then repeats its
    work."""

    async def main() -> None:
        scene = Scene(OPS)
        live = a_job()
        first = scene.manager()
        await first.ended(live, ENDING)
        await scene.led(first, 1.0)
        second = scene.manager()
        await second.load()
        await second.ended(live, ENDING)
        await scene.led(second, 1.0)
        assert scene.told() == ["failed"]
        retried = a_job()
        retried.round = 1
        await second.ended(retried, ENDING)
        await scene.led(second, 1.0)
        assert scene.told() == ["failed", "failed"]
        assert len({one.id for _, one in scene.tried}) == 2, "another round is another end"

    play(main)


def test_an_end_waits_for_the_bucket() -> None:
    async def main() -> None:
        scene = Scene(OPS)

        async def away(*_: Any, **__: Any) -> str:
            raise Unreachable("The bucket is away.")

        scene.objects.put = away  # type: ignore[method-assign]
        with pytest.raises(Unreachable):
            await scene.manager().ended(a_job(), ENDING)

    play(main)


def test_missing_bucket_is_not_retried_forever() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        tries = 0

        async def gone(*_: Any, **__: Any) -> str:
            nonlocal tries
            tries += 1
            raise NotFound("There is no such bucket.")

        scene.objects.put = gone  # type: ignore[method-assign]
        with pytest.raises(NotFound):
            await scene.manager().ended(a_job(), ENDING)
        assert tries < 20

    play(main)


def test_job_without_targets_costs_no_request() -> None:
    async def main() -> None:
        scene = Scene(replace(OPS, on=("succeeded",)))
        await scene.manager().ended(a_job(), ENDING)
        with pytest.raises(NotFound):
            await scene.kept()

    play(main)


def test_job_is_notified_only_to_permitted_targets() -> None:
    async def main() -> None:
        chat = Target("chat", "webhook", "https://hooks.example.org/s3cret", on=(), jobs=True)
        scene = Scene(chat)
        live = a_job("sums", NotifyDef("target", "chat", ("failed",)))
        await scene.manager().ended(live, ENDING)
        assert b"s3cret" not in await scene.objects.get(object_keys.NOTIFICATIONS)
        await scene.led(scene.manager(), 1.0)
        (target,) = scene.reached
        assert (target.kind, target.to, target.job) == ("webhook", chat.to, "sums-1")

    play(main)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (NotifyDef("target", "ops", ("failed",)), "does not have a target 'ops' for jobs"),
        (NotifyDef("webhook", "http://127.0.0.1/"), "the manager's own machine"),
        (NotifyDef("webhook", "https://h.example/", secret="env:BATCHLAB_NOTIFY_A"), "BATCHLAB_NOTIFY_A may sign"),
    ],
)
def test_target_that_is_no_longer_permitted_is_abandoned(own: NotifyDef, told: str) -> None:
    """A notification that was admitted earlier is checked again at each try."""

    async def main() -> None:
        scene = Scene(replace(OPS, on=("capped",)))
        await scene.manager().ended(a_job("sums", own), ENDING)
        await scene.led(scene.manager(), 1.0)
        assert scene.tried == []
        (kept,) = (await scene.kept())["log"]
        assert kept["state"] == "given up"
        assert told in kept["error"]

    play(main)


def test_own_target_of_a_forgotten_job_is_notified() -> None:
    async def main() -> None:
        scene = Scene()
        own = NotifyDef("sns", "arn:aws:sns:eu-central-1:123456789012:batch", ("failed",))
        await scene.manager().ended(a_job("mine", own), ENDING)
        await scene.led(scene.manager(), 1.0)
        assert [(one.target, one.own) for _, one in scene.tried] == [("mine-1#1", own)]

    play(main)


# --- Tries ---------------------------------------------------------------------------------------


def test_retries_back_off_and_survive_the_manager() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda n: NotDelivered("It is away.") if n <= 5 else None
        first = scene.manager()
        await first.ended(a_job(), ENDING)
        await scene.led(first, 10.0)
        assert [at for at, _ in scene.tried] == pytest.approx([0, 2, 6])
        assert first.trouble("sums-1").endswith("attempts: 3, last error: It is away")
        assert "s3cret" not in first.trouble("sums-1")
        second = scene.manager()
        await scene.led(second, 100.0)
        assert [at for at, _ in scene.tried] == pytest.approx([0, 2, 6, 14, 30, 62])
        assert [one.attempts for _, one in scene.tried] == [0, 1, 2, 3, 4, 5]
        assert len({one.id for _, one in scene.tried}) == 1
        assert second.trouble("sums-1") == ""
        assert scene.counts.deliveries == {("webhook", "failed"): 5, ("webhook", "delivered"): 1}

    play(main)


def test_permanent_failure_is_not_retried() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda _: NotDelivered("It is a redirect.", final=True)
        manager = scene.manager()
        await manager.ended(a_job(), ENDING)
        await scene.led(manager, 5000.0)
        assert len(scene.tried) == 1
        (one,) = manager.outbox.log
        assert (one.state, one.error, one.attempts) == ("given up", "It is a redirect.", 1)

    play(main)


def test_after_a_day_it_is_given_up() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        scene.answers = lambda _: NotDelivered("It is away.")
        manager = scene.manager()
        await manager.ended(a_job(), replace(ENDING, ended_s=EPOCH_S))
        await scene.led(manager, 2 * GIVE_UP_S)
        assert GIVE_UP_S <= scene.tried[-1][0] < GIVE_UP_S + 1000
        assert 90 < len(scene.tried) < 120, "every quarter of an hour in the end"
        assert manager.outbox.log[-1].state == "given up"
        assert not manager.outbox.pending

    play(main)


def test_deleted_target_is_abandoned() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        await scene.manager().ended(a_job(), ENDING)
        scene.targets.clear()
        manager = scene.manager()
        await scene.led(manager, 1.0)
        assert "no target 'ops' any more" in manager.outbox.log[0].error
        assert not scene.tried

    play(main)


def test_one_target_that_is_slow_holds_up_no_other() -> None:
    async def main() -> None:
        scene = Scene(OPS, replace(OPS, name="slow", to="https://slow.example.org/"))
        done: list[str] = []

        async def deliver(target: Target, one: Notification) -> None:
            await asyncio.sleep(100.0 if target.name == "slow" else 0.0)
            done.append(target.name)

        scene.deliver = deliver  # type: ignore[method-assign]
        manager = scene.manager()
        for number in range(20):
            await manager.ended(a_job(f"j{number}"), ENDING)
        await scene.led(manager, 250.0)
        assert done == ["ops"] * 20 + ["slow"] * 4, "two at a time"

    play(main)


def test_two_leaders_lose_nothing_of_each_other() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        one, two = scene.manager(), scene.manager()
        await one.load()
        await two.load()
        await one.ended(a_job("a"), ENDING)
        await two.ended(a_job("b"), ENDING)
        await one.ended(a_job("c"), ENDING)
        assert {kept["job"] for kept in (await scene.kept())["pending"]} == {"a-1", "b-1", "c-1"}
        await scene.led(scene.manager(), 1.0)
        await two.ended(a_job("d"), ENDING)
        kept = await scene.kept()
        assert [one["job"] for one in kept["pending"]] == ["d-1"], "what was told stays told"

    play(main)


def test_number_of_pending_notifications_is_bounded() -> None:
    async def main() -> None:
        scene = Scene(OPS)
        manager = scene.manager()
        for number in range(MAX_PENDING):
            live = a_job(f"j{number}")
            one = replace(a_notification(live), id=str(number))
            manager.outbox.pending[one.id] = one
        await manager.ended(a_job("last"), ENDING)
        assert len(manager.outbox.pending) == MAX_PENDING
        assert [one.id for one in manager.outbox.log] == ["0"]

    play(main)
