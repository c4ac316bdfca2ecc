"""Fleet of EC2 Auto Scaling groups, on AWS or at an endpoint with the same API.

Invariant: a request that AWS would refuse is refused before it is sent, because an emulator may accept more than AWS
does.

An instance waits in the launch hook (Pending:Wait) until its worker reports. It waits in the drain hook
(Terminating:Wait) while its worker returns its work. One request describes the groups of all pools. On AWS it is sent
at most every `POLL_S`, and also after each change that this process made.

Completion of the lifecycle hook that holds a terminating instance.

The hook holds the instance while its worker returns its work. Without a completion, the instance waits until the hook
times out, and its whole wait is billed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from batchlab.adapters.aws.endpoint import Endpoint, client, translated
from batchlab.adapters.aws.group_descriptions import (
    DRAIN_HOOK,
    NO_ACTION,
    READY_HOOK,
    ActivityLog,
    GroupParameters,
    GroupState,
    is_missing_instance,
)
from batchlab.adapters.aws.instance_metadata import Imds
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Refused
from batchlab.core.model import Activity, GroupView, Instance, LifecycleState, Pool
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock
from batchlab.fleet.scaling_policies import check_decrement, check_desired, check_limits

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient
    from mypy_boto3_autoscaling.type_defs import ActivityTypeDef, AutoScalingGroupTypeDef

T = TypeVar("T")

POLL_S = 5.0
"""Minimum time in seconds between two Describe calls to AWS.

After a change by this process, the next Describe call comes sooner.
"""
MAX_PROTECTED = 50
"""Maximum number of instances in one call of SetInstanceProtection."""
MAX_INSTANCES = 10_000
"""Maximum number of instances of one Auto Scaling group."""
_ACTIVITIES = 100
_CALLS = 8


class Ec2Fleet:
    """Fleet port over boto3. The name of a pool's group is `prefix` followed by the pool's name.

    boto3 blocks, so each call runs in a thread. The fleet adopts an existing group of that name. Without a `form` it
    creates no groups, so a stack must have created them.
    """

    def __init__(self, endpoint: Endpoint, clock: Clock, form: GroupParameters | None, *, prefix: str) -> None:
        self._asg: AutoScalingClient = client(endpoint, "autoscaling", connections=_CALLS)
        self._clock = clock
        self._form = form
        self._prefix = prefix
        self._poll_s = POLL_S if endpoint.url is None else 0.0
        self._seen: dict[str, GroupState] = {}
        self._lost: set[str] = set()
        """Pools whose groups were deleted by another program. `ensure` creates them again."""
        self._dead: list[Instance] = []
        self._journal = ActivityLog()
        self._reported: set[str] = set()
        self._looked_s: float | None = None
        """Monotonic time of the last description, None if the groups have changed since."""
        self._looking = asyncio.Lock()
        self._calling = ThreadPoolExecutor(_CALLS, thread_name_prefix="autoscaling")

    async def close(self) -> None:
        """Wait for the submitted calls, then end the threads and close the connections."""
        await asyncio.to_thread(self._calling.shutdown)
        self._asg.close()

    async def remove(self, pool: str) -> None:
        """Delete the pool's group with its instances. Raise Refused if the pool is unknown."""
        self._group(pool)
        await self._call(
            pool, lambda name: self._asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
        )
        del self._seen[pool]

    async def _call(self, pool: str, call: Callable[[str], T]) -> T:
        """Call `call` with the name of the pool's group.

        Afterward, the cached description of the groups is out of date.
        """
        try:
            return await self._ask(pool, call)
        finally:
            # A description that began during the call may not contain the change.
            self._looked_s = None

    async def _ask(self, pool: str, call: Callable[[str], T]) -> T:
        def do() -> T:
            with translated(f"Pool {pool!r}"):
                return call(self._prefix + pool)

        return await asyncio.wrap_future(self._calling.submit(do))

    # --- Groups -----------------------------------------------------------------------------------

    async def ensure(self, pool: Pool) -> None:
        """Create or adopt the pool's group and set its limits. Raise Refused unless 0 ≤ min ≤ max."""
        limits = check_limits(pool, most=MAX_INSTANCES)
        if pool.name not in self._seen or pool.name in self._lost:
            await self._found(pool)
            await self._adopt(pool)
        seen = self._seen[pool.name]
        before = seen.desired
        if (seen.pool.min_size, seen.pool.max_size) != (pool.min_size, pool.max_size):
            await self._call(
                pool.name,
                lambda name: self._asg.update_auto_scaling_group(
                    AutoScalingGroupName=name, MinSize=pool.min_size, MaxSize=pool.max_size
                ),
            )
            after = max(pool.min_size, min(pool.max_size, before))
            self._note(pool.name, before, after, f"a user request that set limits to {limits}")
        seen.pool = pool

    async def _found(self, pool: Pool) -> None:
        """Create the group, or set the hooks of an existing group."""
        if self._form is None:
            return
        form = self._form
        try:
            await self._call(pool.name, lambda name: self._create(form, name, pool))
        except AlreadyExists:
            await self._call(pool.name, lambda name: self._put_hooks(form, name, pool))
            return
        limits = f"min: {pool.min_size}, max: {pool.max_size}, desired: {pool.min_size}"
        self._journal.note(
            pool.name, self._clock.now_s(), "Creating group", f"a user request created the group with {limits}"
        )

    async def _adopt(self, pool: Pool) -> None:
        """Add the group to the known groups, with its current state."""
        before = self._seen.get(pool.name)
        self._seen[pool.name] = before or GroupState(pool)
        try:
            await self._look()
        except BaseException as error:
            if before is None:
                del self._seen[pool.name]
            if isinstance(error, NotFound) and self._form is None:
                # NotFound would make the caller create a group.
                raise BackendError(
                    f"There is no Auto Scaling group {self._prefix + pool.name!r}.",
                    remedy="The grid's stack makes its groups: `batchlab deploy apply`.",
                ) from error
            raise

    def _create(self, form: GroupParameters, name: str, pool: Pool) -> None:
        self._asg.create_auto_scaling_group(**form.request(name, pool))

    def _put_hooks(self, form: GroupParameters, name: str, pool: Pool) -> None:
        for hook in form.hooks(pool):
            self._asg.put_lifecycle_hook(AutoScalingGroupName=name, **hook)

    async def describe(self) -> Sequence[GroupView]:
        """Return the groups of the pools that `ensure` was called for."""
        if self._looked_s is None:
            await self._look()
        return [seen.view() for seen in self._seen.values()]

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        seen = await self._current(pool)
        check_desired(seen.pool, desired)
        if desired == seen.desired:
            return
        await self._call(
            pool,
            lambda name: self._asg.set_desired_capacity(
                AutoScalingGroupName=name, DesiredCapacity=desired, HonorCooldown=False
            ),
        )
        self._note(pool, seen.desired, desired, cause)

    def _note(self, pool: str, before: int, after: int, cause: str) -> None:
        if before != after:
            what = f"Setting desired capacity to {after}"
            why = f"{cause} changed desired capacity from {before} to {after}"
            self._journal.note(pool, self._clock.now_s(), what, why)

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Return the newest activities of the service, with the causes of the changes made here."""
        pools = list(self._seen) if pool is None else [pool] if pool in self._seen else []
        told = {one: await self._ask(one, self._activities) for one in pools}
        self._journal.merge(told)
        return self._journal.newest(pool, limit)

    def _activities(self, name: str) -> Sequence[ActivityTypeDef]:
        answer = self._asg.describe_scaling_activities(AutoScalingGroupName=name, MaxRecords=_ACTIVITIES)
        return answer["Activities"]

    # --- Instances --------------------------------------------------------------------------------

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        """Terminate the instances with one request each. Raise Refused where `ManagedFleet` does.

        If a request fails, the earlier ones have taken effect, and the call may be repeated.
        """
        seen = await self._current(pool, instances)
        leaving = [name for name in dict.fromkeys(instances) if seen.counted(name)]
        if decrement:
            check_decrement(seen.pool, seen.desired, len(leaving))
        for name in leaving:
            await self._call(pool, partial(self._terminate, name, decrement))
            seen.ends[name] = cause
        if decrement:
            self._note(pool, seen.desired, seen.desired - len(leaving), cause)

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        """Set scale-in protection. Raise Refused without a change unless all instances are InService."""
        seen = await self._current(pool, instances)
        for name in instances:
            if (state := seen.instances[name].state) is not LifecycleState.IN_SERVICE:
                raise Refused(f"instance {name} is {state}, not InService")
        for start in range(0, len(instances), MAX_PROTECTED):
            some = instances[start : start + MAX_PROTECTED]
            try:
                await self._call(pool, partial(self._protect, some, on))
            except Refused as error:
                # An instance has left since the last description. The next description lists the others.
                if not is_missing_instance(error):
                    raise

    def _terminate(self, instance: str, decrement: bool, _: str) -> None:
        self._asg.terminate_instance_in_auto_scaling_group(
            InstanceId=instance, ShouldDecrementDesiredCapacity=decrement
        )

    def _protect(self, instances: Sequence[str], on: bool, group: str) -> None:
        self._asg.set_instance_protection(AutoScalingGroupName=group, InstanceIds=instances, ProtectedFromScaleIn=on)

    async def ready(self, instance: str) -> None:
        """Complete the launch hook of the instance, now or as soon as the instance waits in it."""
        if instance in self._reported:
            return
        self._reported.add(instance)
        for pool, seen in self._seen.items():
            if instance in seen.waiting:
                await self._proceed(pool, instance)

    async def _proceed(self, pool: str, instance: str) -> None:
        try:
            await self._call(
                pool,
                lambda name: self._asg.complete_lifecycle_action(
                    LifecycleHookName=READY_HOOK,
                    AutoScalingGroupName=name,
                    LifecycleActionResult="CONTINUE",
                    InstanceId=instance,
                ),
            )
        except Refused as error:
            # The hook timed out, or the instance is terminating.
            if NO_ACTION not in str(error):
                raise

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        """Mark the instance as unhealthy. Raise Refused if the instance is unknown."""
        pool = await self._pool_of(instance)
        seen = self._seen[pool]
        if healthy or not seen.counted(instance):
            return
        await self._call(
            pool,
            lambda _: self._asg.set_instance_health(
                InstanceId=instance, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False
            ),
        )
        seen.ends[instance] = f"unhealthy: {cause}"
        self._journal.note(
            pool, self._clock.now_s(), f"Setting health of {instance} to Unhealthy", f"a health check: {cause}"
        )

    async def tick(self) -> Sequence[Instance]:
        """Describe the groups, then complete the hooks of instances whose workers have reported.

        Raise BackendError if the service fails or a group is missing. A later tick may succeed.
        """
        now_s = self._clock.monotonic_s()
        try:
            if self._looked_s is None or now_s - self._looked_s >= self._poll_s:
                await self._look()
            await asyncio.gather(
                *(
                    self._proceed(pool, instance)
                    for pool, seen in self._seen.items()
                    for instance in seen.waiting & self._reported
                )
            )
        except Refused as error:
            raise BackendError(error.message, remedy=error.remedy) from error
        dead, self._dead = self._dead, []
        return dead

    # --- Looking ----------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Describe all groups with one request.

        One more request is made for each group that lost an instance without a known reason.
        """
        async with self._looking:
            if not self._seen:
                return
            looked_s = self._clock.monotonic_s()
            self._looked_s = looked_s
            groups = await self._ask(next(iter(self._seen)), self._described)
            self._lost = {pool for pool in self._seen if self._prefix + pool not in groups}
            for pool, seen in self._seen.items():
                if (group := groups.get(self._prefix + pool)) is None:
                    continue
                gone = seen.look(group, self._clock.now_s())
                self._dead += gone
                self._reported -= {instance.id for instance in gone}
            for pool, seen in list(self._seen.items()):
                if seen.unexplained:
                    explained = seen.explain(await self._ask(pool, self._activities))
                    known = {instance.id: instance for instance in explained}
                    self._dead = [known.get(instance.id, instance) for instance in self._dead]
            if self._lost:
                raise NotFound(f"The group of pool {min(self._lost)!r} is gone.")

    def _described(self, _: str) -> dict[str, AutoScalingGroupTypeDef]:
        names = [self._prefix + pool for pool in self._seen]
        pages = self._asg.get_paginator("describe_auto_scaling_groups").paginate(AutoScalingGroupNames=names)
        return {group["AutoScalingGroupName"]: group for page in pages for group in page["AutoScalingGroups"]}

    def _group(self, pool: str) -> GroupState:
        if pool not in self._seen:
            raise Refused(f"there is no pool {pool!r}", remedy="`batchlab grid status` lists those there are.")
        return self._seen[pool]

    async def _current(self, pool: str, instances: Sequence[str] = ()) -> GroupState:
        """Return the pool, described again if it changed or if one of the instances is unknown."""
        seen = self._group(pool)
        if self._looked_s is None or not all(name in seen.instances for name in instances):
            await self._look()
        for name in instances:
            if name not in seen.instances:
                raise Refused(f"there is no instance {name!r} in pool {pool!r}")
        return seen

    async def _pool_of(self, instance: str) -> str:
        for fresh in (False, True):
            if fresh:
                await self._look()
            for pool, seen in self._seen.items():
                if instance in seen.instances:
                    return pool
        raise Refused(f"there is no instance {instance!r}")


log = logging.getLogger(__name__)


class DrainHook:
    """Drain hook of one group, for the instance that `imds` describes."""

    def __init__(self, endpoint: Endpoint, group: str, imds: Imds) -> None:
        self._endpoint = endpoint
        self._group = group
        self._imds = imds

    async def complete(self, patience: Patience) -> bool:
        """Complete the hook if the group terminates this instance. Return whether it was completed.

        A failure is logged and not raised, because the instance also ends when the hook times out.
        """
        try:
            if not await patience(partial(asyncio.to_thread, self._imds.is_leaving)):
                return False
            await patience(partial(asyncio.to_thread, self._tell))
        except Refused as error:
            if NO_ACTION not in str(error):
                log.warning("the group does not let this instance go: %s", error)
            return False  # else the hook timed out or does not exist, so the instance ends
        except BackendError as error:
            log.warning("this instance waits until its hook times out: %s", error)
            return False
        log.info("the group %s knows that nothing is in hand here", self._group)
        return True

    def _tell(self) -> None:
        scaling = client(self._endpoint, "autoscaling", connections=1)
        try:
            with translated(f"The hook {DRAIN_HOOK!r}"):
                scaling.complete_lifecycle_action(
                    LifecycleHookName=DRAIN_HOOK,
                    AutoScalingGroupName=self._group,
                    LifecycleActionResult="CONTINUE",
                    InstanceId=self._imds.instance_id(),
                )
        finally:
            scaling.close()
