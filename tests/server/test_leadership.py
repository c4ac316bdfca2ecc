"""The loop of leadership, which takes the lead again until it is stopped."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import pytest

from batchlab.core.errors import Unreachable
from batchlab.manager.manager import Manager
from batchlab.server import manager_service


@dataclass
class Leading:
    """A manager that leads until it is canceled, or briefly if it is `short`. The manager raises an error at its end if
    `errors` is true."""

    short: bool = False
    errors: bool = True
    has_led: bool = True
    notifier: Any = None
    runs: int = 0

    async def run(self) -> None:
        self.runs += 1
        try:
            await asyncio.sleep(0.0 if self.short else 60.0)
        finally:
            if self.errors:
                raise ExceptionGroup("of its tasks", [Unreachable("The bucket does not answer.")])


def lead_of(manager: Leading) -> manager_service._Lead:
    return manager_service._Lead(cast(Manager, manager))


def test_error_at_the_end_of_leadership_ends_the_manager() -> None:
    """Before, the manager continued to lead and could not be stopped."""
    first, second = Leading(), Leading(errors=False)

    async def act() -> None:
        leading = asyncio.create_task(manager_service._lead_on(lead_of(first), lambda: cast(Manager, second)))
        await asyncio.sleep(0.01)
        leading.cancel()
        await asyncio.wait({leading}, timeout=10)
        assert leading.cancelled()

    asyncio.run(act())
    assert (first.runs, second.runs) == (1, 0)


def test_manager_that_lost_the_lead_campaigns_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_service, "LEASE_RETRY_S", 0.0)
    first, second = Leading(short=True), Leading(errors=False)

    async def act() -> None:
        lead = lead_of(first)
        leading = asyncio.create_task(manager_service._lead_on(lead, lambda: cast(Manager, second)))
        async with asyncio.timeout(10):
            while not second.runs:
                await asyncio.sleep(0.001)
        assert lead.manager is cast(Manager, second)
        leading.cancel()
        await asyncio.wait({leading}, timeout=10)

    asyncio.run(act())
    assert (first.runs, second.runs) == (1, 1)
