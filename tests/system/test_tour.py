"""The features around jobs on a grid's own emulator, which work as on `local`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab.runtime import factory
from batchlab.runtime.home import Home
from batchlab.runtime.manager_process import kill_manager
from tests.support.aws.autoscaling_api import aws
from tests.support.aws.emulators import ministack_python
from tests.support.grid.backends import World
from tests.support.grid.local_grid import processes_of
from tests.support.grid.tour import WARM, asked, schedules_outlive_the_manager, submitted, what_is_told_of_it
from tests.support.waiting import until


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    ministack_python()
    there = World("ministack", "ministack", tmp_path_factory.mktemp("ministack") / "home")
    there.batchlab("grid", "up", "--backend", "ministack", "--pool", f"default:0-{WARM}x1")
    yield there
    there.batchlab("grid", "down")
    until(lambda: not processes_of(there.home), 5)


def test_a_run_is_looked_at(world: World, tmp_path: Path) -> None:
    """test_follow_logs.py and test_replay_task.py test logs and tasks."""
    what_is_told_of_it(world, *submitted(world, tmp_path))


def test_topic_of_the_emulator_is_notified(world: World) -> None:
    place = Home(world.home).place("ministack")
    assert place
    at = factory.load("ministack").endpoint_at(Home(world.home), place)
    sns, sqs = aws(at, "sns"), aws(at, "sqs")
    topic = sns.create_topic(Name="batch")["TopicArn"]
    queue = sqs.create_queue(QueueName="hears")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn["QueueArn"])
    Home(world.home).notify_file.write_text(f"[topic]\nsns = '{topic}'\n")
    world.batchlab("notify", "test", "topic")
    (message,) = sqs.receive_message(QueueUrl=queue, WaitTimeSeconds=5)["Messages"]
    told = json.loads(json.loads(message["Body"])["Message"])
    assert told["moment"] == "test"
    assert [one["name"] for one in asked(world, "notify", "list")] == ["topic"]


def test_schedules_outlive_their_manager(world: World, tmp_path: Path) -> None:
    def other_manager() -> None:
        assert kill_manager(Home(world.home))
        world.batchlab("grid", "up", "--backend", "ministack")

    schedules_outlive_the_manager(world, tmp_path, other_manager)
