"""What a person may do to the fleet: set limits and capacity, hand them back, drain.

Invariant: a capacity set by hand stays until a person hands the pool back to the policy, or the
manager restarts; the limits hold for both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from batchlab.core.errors import BatchlabError, NotFound, UsageError
from batchlab.core.model import GroupView, LifecycleState

if TYPE_CHECKING:
    from batchlab.manager.manager import Manager

CAUSE = "a user request"
_COUNTED = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


async def groups(manager: Manager) -> dict[str, GroupView]:
    """The groups of the manager's own pools, as they are now."""
    views = await manager.ports.fleet.describe()
    return {view.pool.name: view for view in views if view.pool.name in manager.pools}


async def group(manager: Manager, pool: str) -> GroupView:
    """One of them; NotFound."""
    found = await groups(manager)
    if pool not in found:
        raise NotFound(
            f"There is no pool {pool!r}.", remedy=f"Its pools are {', '.join(sorted(found))}."
        )
    return found[pool]


async def scale(
    manager: Manager,
    pool: str,
    *,
    min_size: int | None = None,
    max_size: int | None = None,
    desired: int | None = None,
    auto: bool | None = None,
) -> GroupView:
    """Change a pool's limits, then hold its capacity at `desired` or hand it back with `auto`
    (False holds it where it is). Refused where the numbers contradict each other."""
    if auto and desired is not None:
        raise UsageError(
            "A pool is either scaled by hand or by the policy.", remedy="Leave one of the two out."
        )
    view = await group(manager, pool)
    await manager.autoscaler.protect_the_busy(view)
    if min_size is not None or max_size is not None:
        await _limit(manager, view, min_size, max_size)
    manager.autoscaler.boots.try_now(pool)
    if auto:
        manager.autoscaler.held.pop(pool, None)
    elif desired is not None:
        await _hold(manager, await group(manager, pool), desired)
    elif auto is False:
        manager.autoscaler.held[pool] = (await group(manager, pool)).desired
    manager.hurry()
    return await group(manager, pool)


async def _limit(
    manager: Manager, view: GroupView, min_size: int | None, max_size: int | None
) -> None:
    pool = replace(
        view.pool,
        min_size=view.pool.min_size if min_size is None else min_size,
        max_size=view.pool.max_size if max_size is None else max_size,
    )
    await manager.ports.fleet.ensure(pool)
    manager.pools[pool.name] = pool


async def _hold(manager: Manager, view: GroupView, desired: int) -> None:
    held, pool = manager.autoscaler.held, view.pool.name
    before = held.get(pool)
    # First, or a tick between the two would set it back to what the policy wants.
    held[pool] = desired
    try:
        await manager.autoscaler.decide(view, desired, CAUSE)
    except BatchlabError:
        if before is None:
            del held[pool]
        else:
            held[pool] = before
        raise


async def drain(manager: Manager, pool: str | None = None) -> None:
    """Take one pool, or every pool, to no instances and hold it there. What runs is finished or
    given back within the worker's drain time."""
    names = [pool] if pool is not None else sorted(manager.pools)
    for name in names:
        await scale(manager, name, min_size=0, desired=0)
        # Desired capacity takes the unprotected; the busy are protected and have to be named.
        instances = (await group(manager, name)).instances
        left = [i.id for i in instances if i.state in _COUNTED]
        if left:
            await manager.ports.fleet.terminate(name, left, decrement=False, cause=CAUSE)
    manager.hurry()
