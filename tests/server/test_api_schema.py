"""The API compared with its description, by generated requests to the application in memory.

The manager only answers requests, and does not run jobs. Every run makes the same requests.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings

from batchlab.adapters.clock import RandomIds, WallClock
from batchlab.adapters.memory.launcher import MemoryState, SimLauncher
from batchlab.adapters.memory.objects import SimObjects
from batchlab.adapters.memory.queue import SimQueue
from batchlab.adapters.sql import open_memory
from batchlab.core.model import Pool
from batchlab.core.port_retries import Patience
from batchlab.fleet.fleet_port import ManagedFleet
from batchlab.manager.manager import Manager
from batchlab.manager.state import Ports
from batchlab.server.http import create_app
from tests.support.server.api import SETTINGS, TOKEN, Machine

EXAMPLES = 4
"""The number of examples per operation and kind."""
AUTH = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    with asyncio.Runner() as runner:
        made, close = runner.run(_open())
        yield made
        runner.run(close())


async def _open() -> tuple[FastAPI, Callable[[], Any]]:
    clock, ids = WallClock(), RandomIds()
    launcher = SimLauncher(lambda pool, instance: Machine(), random.Random(1))
    ledger = open_memory()
    ports = Ports(
        SimObjects(),
        SimQueue(clock, random.Random(2)),
        ManagedFleet(launcher, clock, ids, MemoryState()),
        ledger,
        clock,
        ids,
        Patience(random.Random(3), limit_s=0.0),
    )
    manager = Manager(ports, SETTINGS, [Pool("default")], "manager-1")
    await manager._prepare()
    manager.is_leader.set()
    app, _ = create_app(manager, token=TOKEN, backend_name="memory", on_shutdown=lambda: None, hosts=["testserver"])
    return app, ledger.close


@pytest.fixture(scope="module")
def operations(app: FastAPI) -> Sequence[Any]:
    import schemathesis
    from schemathesis.core.result import Ok

    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    found = [operation.ok() for operation in schema.get_all_operations() if isinstance(operation, Ok)]
    assert len(found) >= 25
    return found


def each(strategy: Any, check: Callable[[Any], None]) -> None:
    """Check some examples of a strategy, which are the same in every run."""

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: Any) -> None:
        check(case)

    run()


def test_without_the_token_every_operation_answers_401(operations: Sequence[Any]) -> None:
    def check(case: Any) -> None:
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer guess"}):
            answer = case.call(headers=headers)
            assert answer.status_code == 401, answer.content
            assert answer.headers["www-authenticate"] == ["Bearer"]

    for operation in operations:
        if operation.path != "/v1/health":
            each(operation.as_strategy(), check)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_with_it_every_operation_is_as_described(operations: Sequence[Any], mode: str) -> None:
    from schemathesis import GenerationMode
    from schemathesis.checks import load_all_checks, not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    load_all_checks()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

    def check(case: Any) -> None:
        case.call_and_validate(headers=AUTH, checks=checks)

    for operation in operations:
        takes_nothing = not (list(operation.iter_parameters()) or list(operation.body))
        if mode == "positive" or not takes_nothing:  # an operation without parameters cannot be called wrongly
            each(operation.as_strategy(generation_mode=GenerationMode(mode)), check)
