"""Fleet of EC2 Auto Scaling groups, on AWS or at an endpoint with the same API.

Invariant: the fleet refuses each request that AWS would refuse, because an emulator may accept such a request.

An instance waits in the launch hook (Pending:Wait) until its worker reports. An instance waits in the drain hook
(Terminating:Wait) while its worker returns its work. One DescribeAutoScalingGroups request describes the groups of all
pools. On AWS, the fleet sends the Describe request at most every `POLL_S` seconds, but sooner after a change that this
process made.

If no program completes the drain hook, the instance waits until the hook times out. AWS bills the instance during the
whole wait.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from batchlab.adapters.aws.endpoint import Endpoint, client, translate_errors
from batchlab.adapters.aws.group_descriptions import (
    DRAIN_HOOK,
    END_ACTION,
    END_PROCESSES,
    NO_ACTION,
    READY_HOOK,
    ActivityLog,
    GroupParameters,
    GroupState,
    is_missing_instance,
)
from batchlab.adapters.aws.instance_metadata import Imds
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Refused
from batchlab.core.model import Activity, GroupView, Instance, LifecycleState, Pool, ScheduledEnd
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Clock
from batchlab.fleet.scaling_policies import check_decrement, check_desired, check_limits

if TYPE_CHECKING:
    from mypy_boto3_autoscaling import AutoScalingClient
    from mypy_boto3_autoscaling.type_defs import (
        ActivityTypeDef,
        AutoScalingGroupTypeDef,
        LifecycleHookSpecificationTypeDef,
        ScheduledActionsTypeTypeDef,
    )

T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_S = 5.0
"""Minimum time in seconds between two Describe calls to AWS.

After this process changes a group, the next Describe call comes sooner.
"""
MAX_PROTECTED = 50
"""Maximum number of instances in one call of SetInstanceProtection."""
MAX_INSTANCES = 10_000
"""Maximum number of instances of one Auto Scaling group."""
END_TRIES = 3
"""Number of start times, a minute apart, that are tried for the scheduled action. Two actions of a group need different
start times."""
_ACTIVITIES = 100
_CALLS = 8


class Ec2Fleet:
    """Fleet port over boto3. The name of a pool's group is `prefix` followed by the pool's name.

    A boto3 call blocks its thread, so the fleet makes boto3 calls in separate threads. The fleet adopts an existing
    Auto Scaling group with the name of a pool's group. Without `form`, the fleet does not create groups, so a stack
    must have created the groups.
    """

    is_managed_service = True

    def __init__(self, endpoint: Endpoint, clock: Clock, form: GroupParameters | None, *, prefix: str) -> None:
        self._asg: AutoScalingClient = client(endpoint, "autoscaling", connections=_CALLS)
        self._clock = clock
        self._form = form
        self._prefix = prefix
        self._poll_s = POLL_S if endpoint.url is None else 0.0
        self._groups: dict[str, GroupState] = {}
        self._deleted: set[str] = set()
        """Pools whose groups were deleted by another program. `ensure` creates the deleted groups again."""
        self._ended: list[Instance] = []
        self._activity_log = ActivityLog()
        self._ready: set[str] = set()
        self._described_s: float | None = None
        """Monotonic time of the last description of the groups, or None if a group has changed since then."""
        self._describing = asyncio.Lock()
        self._calling = ThreadPoolExecutor(_CALLS, thread_name_prefix="autoscaling")

    async def close(self) -> None:
        """Wait for the submitted calls, then end the threads and close the connections."""
        await asyncio.to_thread(self._calling.shutdown)
        self._asg.close()

    async def remove(self, pool: str) -> None:
        """Delete the pool's group with its instances. Raise Refused if the pool is unknown."""
        self._group_of(pool)
        await self._call(
            pool, lambda name: self._asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
        )
        del self._groups[pool]

    async def _call(self, pool: str, call: Callable[[str], T]) -> T:
        """Return the result of `call`, which gets the name of the pool's group.

        After `call`, the cached description of the groups is out of date.
        """
        try:
            return await self._request(pool, call)
        finally:
            # If a description of the groups began while `call` was running, the description may lack the change that
            # `call` made.
            self._described_s = None

    async def _request(self, pool: str, call: Callable[[str], T]) -> T:
        def do() -> T:
            with translate_errors(f"Pool {pool!r}"):
                return call(self._prefix + pool)

        return await asyncio.wrap_future(self._calling.submit(do))

    # --- Groups -----------------------------------------------------------------------------------

    async def ensure(self, pool: Pool) -> None:
        """Create or adopt the pool's group and set the limits of its size. Raise Refused unless 0 ≤ min ≤ max."""
        limits = check_limits(pool, most=MAX_INSTANCES)
        if pool.name not in self._groups or pool.name in self._deleted:
            await self._create_group(pool)
            await self._adopt(pool)
        group = self._groups[pool.name]
        before = group.desired
        if (group.pool.min_size, group.pool.max_size) != (pool.min_size, pool.max_size):
            await self._call(
                pool.name,
                lambda name: self._asg.update_auto_scaling_group(
                    AutoScalingGroupName=name, MinSize=pool.min_size, MaxSize=pool.max_size
                ),
            )
            after = max(pool.min_size, min(pool.max_size, before))
            self._note(pool.name, before, after, f"a user request that set limits to {limits}")
        group.pool = pool

    async def _create_group(self, pool: Pool) -> None:
        """Create the pool's group. If the group exists, set the lifecycle hooks of the group."""
        if self._form is None:
            return
        form = self._form
        try:
            await self._call(pool.name, lambda name: self._asg.create_auto_scaling_group(**form.request(name, pool)))
        except AlreadyExists:
            for hook in form.hooks(pool):
                await self._call(pool.name, partial(self._put_hook, hook))
            return
        limits = f"min: {pool.min_size}, max: {pool.max_size}, desired: {pool.min_size}"
        self._activity_log.note(
            pool.name, self._clock.now_s(), "Creating group", f"a user request created the group with {limits}"
        )

    async def _adopt(self, pool: Pool) -> None:
        """Add the pool's group to `_groups`, with the group's current state."""
        before = self._groups.get(pool.name)
        self._groups[pool.name] = before or GroupState(pool)
        try:
            await self._describe()
        except BaseException as error:
            if before is None:
                del self._groups[pool.name]
            if isinstance(error, NotFound) and self._form is None:
                # The error is not NotFound, because the caller would create a group after NotFound.
                raise BackendError(
                    f"The Auto Scaling group {self._prefix + pool.name!r} does not exist.",
                    remedy="Create it with the grid's stack: `batchlab deploy apply`.",
                ) from error
            raise

    def _put_hook(self, hook: LifecycleHookSpecificationTypeDef, group: str) -> None:
        self._asg.put_lifecycle_hook(AutoScalingGroupName=group, **hook)

    async def describe(self) -> Sequence[GroupView]:
        if self._described_s is None:
            await self._describe()
        return [group.view() for group in self._groups.values()]

    async def set_desired(self, pool: str, desired: int, *, cause: str) -> None:
        group = await self._current(pool)
        check_desired(group.pool, desired)
        if desired == group.desired:
            return
        await self._call(
            pool,
            lambda name: self._asg.set_desired_capacity(
                AutoScalingGroupName=name, DesiredCapacity=desired, HonorCooldown=False
            ),
        )
        self._note(pool, group.desired, desired, cause)

    async def schedule_end(self, pool: str, after_s: float | None) -> ScheduledEnd:
        """Create, postpone, or delete the group's scheduled action (see the Fleet port).

        AWS refuses requests of a clock that differs by more than 5 minutes, so the action's time differs at most by 5
        minutes. The group may have another scheduled action at the same time, so three times are tried.
        """
        group = self._group_of(pool)
        existed = bool((await self._request(pool, self._scheduled_ends))["ScheduledUpdateGroupActions"])
        if after_s is None:
            if existed:
                await self._call(pool, self._delete_end)
            return ScheduledEnd(existed)
        at = datetime.fromtimestamp(math.ceil(self._clock.now_s() + after_s), UTC)
        for minute in range(END_TRIES):
            try:
                await self._call(pool, partial(self._put_end, at + timedelta(minutes=minute)))
                break
            except AlreadyExists:
                if minute == END_TRIES - 1:
                    raise
        if missing := sorted(group.suspended & set(END_PROCESSES)):
            problem = (
                f"The group of pool {pool!r} would not end without a manager, because its process {missing[0]} is "
                f"suspended. Resume it with `aws autoscaling resume-processes --auto-scaling-group-name "
                f"{self._prefix + pool}`."
            )
            return ScheduledEnd(existed, problem, is_performed=END_PROCESSES[0] not in missing)
        return ScheduledEnd(existed)

    def _scheduled_ends(self, group: str) -> ScheduledActionsTypeTypeDef:
        return self._asg.describe_scheduled_actions(AutoScalingGroupName=group, ScheduledActionNames=[END_ACTION])

    def _put_end(self, at: datetime, group: str) -> None:
        # A maximum size of 0 also prevents launches by another scheduled action that raises the minimum size, such as
        # the peak of a stack.
        self._asg.put_scheduled_update_group_action(
            AutoScalingGroupName=group,
            ScheduledActionName=END_ACTION,
            StartTime=at,
            MinSize=0,
            MaxSize=0,
            DesiredCapacity=0,
        )

    def _delete_end(self, group: str) -> None:
        self._asg.delete_scheduled_action(AutoScalingGroupName=group, ScheduledActionName=END_ACTION)

    def _note(self, pool: str, before: int, after: int, cause: str) -> None:
        if before != after:
            what = f"Setting desired capacity to {after}"
            why = f"{cause} changed desired capacity from {before} to {after}"
            self._activity_log.note(pool, self._clock.now_s(), what, why)

    async def activities(self, pool: str | None = None, *, limit: int = 50) -> Sequence[Activity]:
        """Return the newest scaling activities, with the causes of the changes that this process made."""
        pools = list(self._groups) if pool is None else [pool] if pool in self._groups else []
        self._activity_log.merge({name: await self._request(name, self._activities) for name in pools})
        return self._activity_log.newest(pool, limit)

    def _activities(self, name: str) -> Sequence[ActivityTypeDef]:
        answer = self._asg.describe_scaling_activities(AutoScalingGroupName=name, MaxRecords=_ACTIVITIES)
        return answer["Activities"]

    # --- Instances --------------------------------------------------------------------------------

    async def terminate(self, pool: str, instances: Sequence[str], *, decrement: bool, cause: str) -> None:
        """Terminate each instance with its own request. Raise Refused in the same cases as `ManagedFleet.terminate`.

        If one termination request fails, the earlier termination requests have already taken effect. The caller may
        repeat the call.
        """
        group = await self._current(pool, instances)
        leaving = [name for name in dict.fromkeys(instances) if group.is_counted(name)]
        if decrement:
            check_decrement(group.pool, group.desired, len(leaving))
        for name in leaving:
            await self._call(pool, partial(self._terminate, name, decrement))
            group.ends[name] = cause
        if decrement:
            self._note(pool, group.desired, group.desired - len(leaving), cause)

    async def protect(self, pool: str, instances: Sequence[str], *, on: bool) -> None:
        group = await self._current(pool, instances)
        for name in instances:
            if (state := group.instances[name].state) is not LifecycleState.IN_SERVICE:
                raise Refused(f"Instance {name} is {state}, not InService.")
        for start in range(0, len(instances), MAX_PROTECTED):
            batch = instances[start : start + MAX_PROTECTED]
            try:
                await self._call(pool, partial(self._protect, batch, on))
            except Refused as error:
                # An instance has left its group since the last description of the groups. The next description of the
                # groups lists the remaining instances.
                if not is_missing_instance(error):
                    raise

    def _terminate(self, instance: str, decrement: bool, _: str) -> None:
        self._asg.terminate_instance_in_auto_scaling_group(
            InstanceId=instance, ShouldDecrementDesiredCapacity=decrement
        )

    def _protect(self, instances: Sequence[str], on: bool, group: str) -> None:
        self._asg.set_instance_protection(AutoScalingGroupName=group, InstanceIds=instances, ProtectedFromScaleIn=on)

    async def ready(self, instance: str) -> None:
        """Complete the launch hook of the instance, now or as soon as the instance waits in the launch hook."""
        if instance in self._ready:
            return
        self._ready.add(instance)
        for pool, group in self._groups.items():
            if instance in group.waiting:
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
            # The launch hook has timed out, or the instance is terminating.
            if NO_ACTION not in str(error):
                raise

    async def set_health(self, instance: str, *, healthy: bool, cause: str) -> None:
        pool = await self._pool_of(instance)
        group = self._groups[pool]
        if healthy or not group.is_counted(instance):
            return
        await self._call(
            pool,
            lambda _: self._asg.set_instance_health(
                InstanceId=instance, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False
            ),
        )
        group.ends[instance] = f"unhealthy: {cause}"
        self._activity_log.note(
            pool, self._clock.now_s(), f"Setting health of {instance} to Unhealthy", f"a health check: {cause}"
        )

    async def tick(self) -> Sequence[Instance]:
        """Describe the groups, then complete the hooks of instances whose workers have reported.

        Raise BackendError if EC2 Auto Scaling fails or a group is missing. After a BackendError, the next tick may
        succeed.
        """
        now_s = self._clock.monotonic_s()
        try:
            if self._described_s is None or now_s - self._described_s >= self._poll_s:
                await self._describe()
            await asyncio.gather(
                *(
                    self._proceed(pool, instance)
                    for pool, group in self._groups.items()
                    for instance in group.waiting & self._ready
                )
            )
        except Refused as error:
            raise BackendError(error.message, remedy=error.remedy) from error
        ended, self._ended = self._ended, []
        return ended

    # --- Descriptions -----------------------------------------------------------------------------

    async def _describe(self) -> None:
        """Describe all groups with one request.

        Send one more request for each group that lost an instance for an unknown reason.
        """
        async with self._describing:
            if not self._groups:
                return
            described_s = self._clock.monotonic_s()
            self._described_s = described_s
            groups = await self._request(next(iter(self._groups)), self._descriptions)
            self._deleted = {pool for pool in self._groups if self._prefix + pool not in groups}
            for pool, group in self._groups.items():
                if (description := groups.get(self._prefix + pool)) is None:
                    continue
                ended = group.update(description, self._clock.now_s())
                self._ended += ended
                self._ready -= {instance.id for instance in ended}
            for pool, group in list(self._groups.items()):
                if group.unexplained:
                    explained = group.explain(await self._request(pool, self._activities))
                    by_id = {instance.id: instance for instance in explained}
                    self._ended = [by_id.get(instance.id, instance) for instance in self._ended]
            if self._deleted:
                raise NotFound(f"The group of pool {min(self._deleted)!r} does not exist anymore.")

    def _descriptions(self, _: str) -> dict[str, AutoScalingGroupTypeDef]:
        names = [self._prefix + pool for pool in self._groups]
        pages = self._asg.get_paginator("describe_auto_scaling_groups").paginate(AutoScalingGroupNames=names)
        return {group["AutoScalingGroupName"]: group for page in pages for group in page["AutoScalingGroups"]}

    def _group_of(self, pool: str) -> GroupState:
        if pool not in self._groups:
            raise Refused(f"The fleet does not have a pool {pool!r}.", remedy="`batchlab grid status` lists the pools.")
        return self._groups[pool]

    async def _current(self, pool: str, instances: Sequence[str] = ()) -> GroupState:
        """Return the state of the pool's group.

        Describe the groups again if a group has changed or an instance is unknown.
        """
        group = self._group_of(pool)
        if self._described_s is None or not all(name in group.instances for name in instances):
            await self._describe()
        for name in instances:
            if name not in group.instances:
                raise Refused(f"The pool {pool!r} does not have an instance {name!r}.")
        return group

    async def _pool_of(self, instance: str) -> str:
        for is_second_try in (False, True):
            if is_second_try:
                await self._describe()
            for pool, group in self._groups.items():
                if instance in group.instances:
                    return pool
        raise Refused(f"The fleet does not have an instance {instance!r}.")


class DrainHook:
    """Drain hook of one group, for the instance that `imds` describes."""

    def __init__(self, endpoint: Endpoint, group: str, imds: Imds) -> None:
        self._endpoint = endpoint
        self._group = group
        self._imds = imds

    async def complete(self, patience: Patience) -> bool:
        """Complete the drain hook if the group terminates this instance. Return whether the drain hook was completed.

        A failed completion is logged and not raised, because the instance also ends when the hook times out.
        """
        try:
            if not await patience(partial(asyncio.to_thread, self._imds.is_leaving)):
                return False
            await patience(partial(asyncio.to_thread, self._complete))
        except Refused as error:
            if NO_ACTION not in str(error):
                log.warning("the group refuses the completion of the hook: %s", error)
            # The drain hook has timed out or does not exist, so the instance ends although the hook was not completed.
            return False
        except BackendError as error:
            log.warning("this instance waits until its hook times out: %s", error)
            return False
        log.info("the hook of the group %s is completed", self._group)
        return True

    def _complete(self) -> None:
        scaling = client(self._endpoint, "autoscaling", connections=1)
        with closing(scaling), translate_errors(f"The hook {DRAIN_HOOK!r}"):
            scaling.complete_lifecycle_action(
                LifecycleHookName=DRAIN_HOOK,
                AutoScalingGroupName=self._group,
                LifecycleActionResult="CONTINUE",
                InstanceId=self._imds.instance_id(),
            )
