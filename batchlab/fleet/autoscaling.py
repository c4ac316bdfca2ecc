"""AWS's Auto Scaling API over a launcher, with AWS's names, defaults, and errors.

Requests only change the state. `tick`, the only coroutine, applies the changes. The caller calls `tick` about every
second, and immediately after a request. A request raises a Fault if AWS would answer 400. Lists are complete, because
the server does the paging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchlab.fleet import instance_refresh, placement, request_base
from batchlab.fleet import warm_pool as warm
from batchlab.fleet.api_types import (
    ActiveInstanceRefreshNotFound,
    DesiredConfiguration,
    GroupConfig,
    InstanceDetails,
    InstanceRefresh,
    InstanceRefreshInProgress,
    IrreversibleInstanceRefresh,
    LaunchTemplate,
    RefreshPreferences,
    StoppableLauncher,
    ValidationError,
    WarmPool,
)
from batchlab.fleet.group_requests import GroupRequests
from batchlab.fleet.group_state import instance_details
from batchlab.fleet.instance_requests import HookRequests, InstanceRequests
from batchlab.fleet.policy_requests import PolicyRequests, ScheduleRequests
from batchlab.fleet.request_base import Requests

DEFAULT_PREFERENCES = RefreshPreferences()
_STEPLESS = ("$Latest", "$Default")


class RefreshRequests(Requests):
    def start_instance_refresh(
        self,
        name: str,
        *,
        strategy: str = "Rolling",
        preferences: RefreshPreferences = DEFAULT_PREFERENCES,
        desired_configuration: DesiredConfiguration | None = None,
    ) -> str:
        """Start a refresh and return its id. Raise InstanceRefreshInProgress if one is active."""
        group, asg = self._changeable(name)
        if asg.rolling is not None:
            raise InstanceRefreshInProgress(
                "An Instance Refresh is already in progress and blocks the execution of this Instance Refresh."
            )
        if strategy != "Rolling":
            raise ValidationError(f"The strategy {strategy} is not supported; Rolling is.")
        _check_preferences(preferences, desired_configuration)
        if desired_configuration is not None:
            wanted = placement.apply(
                asg.config, desired_configuration.launch_template, desired_configuration.mixed_instances_policy
            )
            placement.check(wanted, self._data_sources)
        started = InstanceRefresh(
            self._changes.ids.fresh("refresh"),
            name,
            "Pending",
            self._changes.now_s(),
            preferences=preferences,
            desired_configuration=desired_configuration,
        )
        instance_refresh.begin(self._changes, group, asg, started, self._data_sources)
        self._save()
        return started.instance_refresh_id

    def cancel_instance_refresh(self, name: str) -> str:
        """Cancel the refresh and return its id. Started replacements are completed."""
        _, asg = self._changeable(name)
        if asg.rolling is None:
            raise _no_refresh(name)
        instance_refresh.cancel(self._changes, asg.rolling)
        self._save()
        return asg.rolling.refresh.instance_refresh_id

    def rollback_instance_refresh(self, name: str) -> str:
        """Roll the refresh back and return its id. Raise IrreversibleInstanceRefresh if the refresh lacks a desired
        configuration, or if the version of the group's own template is not fixed."""
        group, asg = self._changeable(name)
        if asg.rolling is None:
            raise _no_refresh(name)
        if asg.rolling.refresh.desired_configuration is None:
            raise IrreversibleInstanceRefresh(
                "The instance refresh has no desired configuration, so there is nothing to undo."
            )
        own = _template_of_group(asg.config)
        if own is not None and own.version in _STEPLESS:
            raise IrreversibleInstanceRefresh(f"The group's own launch template version is {own.version}, which moves.")
        instance_refresh.roll_back(self._changes, group, asg.rolling)
        self._save()
        return asg.rolling.refresh.instance_refresh_id

    def describe_instance_refreshes(self, name: str, refresh_ids: Sequence[str] = ()) -> Sequence[InstanceRefresh]:
        """Return refreshes, newest first."""
        _, asg = self._asg_group(name)
        running = [asg.rolling.refresh] if asg.rolling else []
        return [
            instance_refresh
            for instance_refresh in running + asg.refreshes
            if not refresh_ids or instance_refresh.instance_refresh_id in refresh_ids
        ]


def _template_of_group(config: GroupConfig) -> LaunchTemplate | None:
    mixed = config.mixed_instances_policy
    return mixed.launch_template if mixed else config.launch_template


def _no_refresh(name: str) -> ActiveInstanceRefreshNotFound:
    return ActiveInstanceRefreshNotFound(
        f"No in progress or pending Instance Refresh found for Auto Scaling group {name}"
    )


def _check_preferences(preferences: RefreshPreferences, wanted: DesiredConfiguration | None) -> None:
    low, high = preferences.min_healthy_percentage, preferences.max_healthy_percentage
    if not 0 <= low <= 100 <= high <= 200 or high - low > 100:
        raise ValidationError(
            "MinHealthyPercentage must be between 0 and 100, MaxHealthyPercentage between 100 and"
            " 200, and they must not be more than 100 apart."
        )
    steps = preferences.checkpoint_percentages
    if list(steps) != sorted(set(steps)) or any(not 0 < step <= 100 for step in steps):
        raise ValidationError("CheckpointPercentages must rise, from 1 to 100.")
    choices = (
        (preferences.scale_in_protected_instances, ("Refresh", "Ignore", "Wait")),
        (preferences.standby_instances, ("Terminate", "Ignore", "Wait")),
    )
    for value, allowed in choices:
        if value not in allowed:
            raise ValidationError(f"{value} is none of {', '.join(allowed)}.")
    if preferences.auto_rollback and wanted is None:
        raise ValidationError("AutoRollback needs a desired configuration.")


class WarmPoolRequests(Requests):
    def put_warm_pool(self, name: str, warm_pool: WarmPool) -> None:
        """Create or change the warm pool. Instances in the pool keep their state."""
        _, asg = self._changeable(name)
        if asg.rolling is not None:
            raise InstanceRefreshInProgress("The warm pool cannot be changed while an instance refresh is in progress.")
        request_base.one_of("PoolState", warm_pool.pool_state, tuple(warm.RESTED))
        prepared = warm_pool.max_group_prepared_capacity
        # AWS's -1 turns the setting off.
        prepared = None if prepared is not None and prepared < 0 else prepared
        if warm_pool.min_size < 0:
            raise ValidationError("MinSize must not be negative.")
        if prepared is not None and prepared < max(warm_pool.min_size, asg.config.min_size):
            raise ValidationError(
                "MaxGroupPreparedCapacity must not be less than the MinSize of the warm pool or that of the group."
            )
        if warm_pool.pool_state != "Running" and not isinstance(self._launcher, StoppableLauncher):
            raise ValidationError(
                f"This endpoint's instances cannot be {warm_pool.pool_state.lower()}; give the warm"
                " pool the PoolState Running."
            )
        asg.warm_pool = replace(warm_pool, max_group_prepared_capacity=prepared, status=None)
        self._save(changed=True)

    def delete_warm_pool(self, name: str, *, force_delete: bool = False) -> None:
        """Delete the warm pool. With `force_delete`, its instances are terminated at once. Otherwise, the next tick
        terminates them."""
        group, asg = self._changeable(name)
        if asg.warm_pool is None:
            raise ValidationError(f"No warm pool found for Auto Scaling group {name}")
        asg.warm_pool = replace(asg.warm_pool, status="PendingDelete")
        self._changes.unsaved = True
        if force_delete:
            warm.trim(self._changes, group, asg)
        self._save()

    def describe_warm_pool(self, name: str) -> tuple[WarmPool | None, Sequence[InstanceDetails]]:
        """Return the configuration, or None without a warm pool, and the instances."""
        group, asg = self._asg_group(name)
        return asg.warm_pool, [instance_details(group, member) for member in warm.members(group)]


class AutoScaling(
    GroupRequests, InstanceRequests, HookRequests, PolicyRequests, ScheduleRequests, RefreshRequests, WarmPoolRequests
):
    """All requests, with AWS's names in snake case."""
