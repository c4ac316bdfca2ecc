"""A Fleet without instances, for tests that run their own workers or answer messages themselves."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.core.model import Activity, GroupView, Instance, Pool, ScheduledEnd


class NoFleet:
    """A fleet that never has an instance."""

    is_managed_service = False

    async def ensure(self, pool: Pool) -> None: ...

    async def describe(self) -> Sequence[GroupView]:
        return ()

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None: ...

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None: ...

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None: ...

    async def ready(self, instance: str) -> None: ...

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None: ...

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        return ()

    async def schedule_end(self, pool: str, after_s: float | None) -> ScheduledEnd:
        return ScheduledEnd(existed=False)

    async def tick(self) -> Sequence[Instance]:
        return ()
