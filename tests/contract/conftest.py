"""Fixtures of the contract suites."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from batchlab.adapters.aws.sqs import SqsQueue
from tests.support.aws.autoscaling_fixtures import our, ours, wire
from tests.support.aws.emulators import EMULATORS
from tests.support.contract.queue_worlds import CHECKS, QueueWorld, at_emulator
from tests.support.contract.side_by_side import SideBySide

__all__ = ["our", "ours", "wire"]


def _queue_checks(world: str) -> Callable[..., Iterator[SideBySide[QueueWorld]]]:
    @pytest.fixture(scope="session", name=f"queue_checks_{world}")
    def checks(request: pytest.FixtureRequest) -> Iterator[SideBySide[QueueWorld]]:
        """Run checks of the Queue port at this emulator."""
        queue = SqsQueue(request.getfixturevalue(world))
        ahead = [
            CHECKS[item.function]
            for item in request.session.items
            if isinstance(item, pytest.Function) and item.function in CHECKS and item.callspec.params["world"] == world
        ]
        side_by_side = SideBySide(at_emulator(world, queue), ahead)
        yield side_by_side
        side_by_side.close()
        asyncio.run(queue.close())

    return checks


queue_checks_ministack, queue_checks_localstack, queue_checks_moto = map(_queue_checks, EMULATORS)
