"""User commands for the fleet: set limits and capacity, return a pool to the scaling policy, and drain.

Invariant: a capacity set by a user stays until the user returns the pool to the scaling policy, or the manager
restarts. The pool's limits apply to the user's capacity and to the scaling policy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from batchlab.core.errors import BatchlabError, NotFound, UsageError
from batchlab.core.model import GroupView, LifecycleState
from batchlab.manager import admission

if TYPE_CHECKING:
    from batchlab.manager.manager import Manager

CAUSE = "a user request"
_COUNTED = (LifecycleState.PENDING, LifecycleState.IN_SERVICE)


async def groups(manager: Manager) -> dict[str, GroupView]:
    views = await manager.ports.fleet.describe()
    return {view.pool.name: view for view in views if view.pool.name in manager.pools}


async def group(manager: Manager, pool: str) -> GroupView:
    """Return the group of a pool. Raise NotFound if the pool does not exist."""
    views = await groups(manager)
    if pool not in views:
        raise NotFound(f"The pool {pool!r} does not exist.", remedy=f"The pools are {', '.join(sorted(views))}.")
    return views[pool]


async def scale(
    manager: Manager,
    pool: str,
    *,
    min_size: int | None = None,
    max_size: int | None = None,
    desired: int | None = None,
    auto: bool | None = None,
) -> GroupView:
    """Change a pool's limits, then hold the pool's capacity at `desired`, or return the pool to the scaling policy with
    `auto`. With `auto=False`, hold the pool's current capacity. Raise UsageError for contradictory arguments, and
    Refused for sizes that the pool cannot have."""
    if auto and desired is not None:
        raise UsageError("A pool is either scaled by hand or by the policy.", remedy="Leave one of the two out.")
    view = await group(manager, pool)
    await manager.autoscaler.protect_the_busy(view)
    if min_size is not None or max_size is not None:
        await _limit(manager, view, min_size, max_size)
    manager.autoscaler.launch_breaker.retry_now(pool)
    if auto:
        manager.autoscaler.user_capacity.pop(pool, None)
    elif desired is not None:
        await _hold(manager, await group(manager, pool), desired)
    elif auto is False:
        manager.autoscaler.user_capacity[pool] = (await group(manager, pool)).desired
    manager.wake()
    return await group(manager, pool)


async def _limit(manager: Manager, view: GroupView, min_size: int | None, max_size: int | None) -> None:
    pool = replace(
        view.pool,
        min_size=view.pool.min_size if min_size is None else min_size,
        max_size=view.pool.max_size if max_size is None else max_size,
    )
    if manager.one_machine:
        admission.check_shared_gpus([*(one for one in manager.pools.values() if one.name != pool.name), pool])
    # The next tick restores a maximum of 0 if the configured maximum is higher.
    before, manager.pools[pool.name] = manager.pools[pool.name], pool
    try:
        await manager.ports.fleet.ensure(pool)
    except BaseException:
        manager.pools[pool.name] = before
        raise


async def _hold(manager: Manager, view: GroupView, desired: int) -> None:
    capacities, pool = manager.autoscaler.user_capacity, view.pool.name
    before = capacities.get(pool)
    # The user's capacity is stored before the call of the fleet, because a tick of the manager during the call would
    # restore the capacity of the scaling policy.
    capacities[pool] = desired
    try:
        await manager.autoscaler.set_desired(view, desired, CAUSE)
    except BatchlabError:
        if before is None:
            del capacities[pool]
        else:
            capacities[pool] = before
        raise


async def drain(manager: Manager, pool: str | None = None) -> None:
    """Hold one pool, or every pool, at 0 instances. Running tasks finish or return to the queue within the worker's
    drain time."""
    names = [pool] if pool is not None else sorted(manager.pools)
    for name in names:
        await scale(manager, name, min_size=0, desired=0)
        # A lower desired capacity ends only unprotected instances, so the protected busy instances are terminated by
        # id.
        instances = (await group(manager, name)).instances
        ids = [i.id for i in instances if i.state in _COUNTED]
        if ids:
            await manager.ports.fleet.terminate(name, ids, decrement=False, cause=CAUSE)
    manager.wake()
