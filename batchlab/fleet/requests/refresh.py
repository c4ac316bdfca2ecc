"""Instance refresh."""

from __future__ import annotations

from collections.abc import Sequence

from batchlab.fleet import placement, refresh
from batchlab.fleet.api import (
    DesiredConfiguration,
    GroupConfig,
    InstanceRefresh,
    LaunchTemplate,
    RefreshPreferences,
)
from batchlab.fleet.faults import (
    ActiveInstanceRefreshNotFound,
    InstanceRefreshInProgress,
    IrreversibleInstanceRefresh,
    ValidationError,
)
from batchlab.fleet.requests.base import Requests

DEFAULT_PREFERENCES = RefreshPreferences()
_STEPLESS = ("$Latest", "$Default")


class RefreshRequests(Requests):
    """As AWS's API reference says, under the same names."""

    def start_instance_refresh(
        self,
        name: str,
        *,
        strategy: str = "Rolling",
        preferences: RefreshPreferences = DEFAULT_PREFERENCES,
        desired_configuration: DesiredConfiguration | None = None,
    ) -> str:
        """The refresh's id. InstanceRefreshInProgress where there is one."""
        group, asg = self._changeable(name)
        if asg.rolling is not None:
            raise InstanceRefreshInProgress(
                "An Instance Refresh is already in progress and blocks the execution of this"
                " Instance Refresh."
            )
        if strategy != "Rolling":
            raise ValidationError(f"The strategy {strategy} is not supported; Rolling is.")
        _check(preferences, desired_configuration)
        if desired_configuration is not None:
            wanted = placement.apply(
                asg.config,
                desired_configuration.launch_template,
                desired_configuration.mixed_instances_policy,
            )
            placement.check(wanted, self._facts)
        started = InstanceRefresh(
            self._changes.ids.fresh("refresh"),
            name,
            "Pending",
            self._changes.now_s(),
            preferences=preferences,
            desired_configuration=desired_configuration,
        )
        refresh.begin(self._changes, group, asg, started, self._facts)
        self._save()
        return started.instance_refresh_id

    def cancel_instance_refresh(self, name: str) -> str:
        """Its id. What it has begun to replace is replaced still."""
        _, asg = self._changeable(name)
        if asg.rolling is None:
            raise _none(name)
        refresh.cancel(self._changes, asg.rolling)
        self._save()
        return asg.rolling.refresh.instance_refresh_id

    def rollback_instance_refresh(self, name: str) -> str:
        """Its id. IrreversibleInstanceRefresh without a desired configuration, or where the group's
        own template has no version of its own to go back to."""
        group, asg = self._changeable(name)
        if asg.rolling is None:
            raise _none(name)
        if asg.rolling.refresh.desired_configuration is None:
            raise IrreversibleInstanceRefresh(
                "The instance refresh has no desired configuration, so there is nothing to undo."
            )
        own = _template(asg.config)
        if own is not None and own.version in _STEPLESS:
            raise IrreversibleInstanceRefresh(
                f"The group's own launch template version is {own.version}, which moves."
            )
        refresh.roll_back(self._changes, group, asg.rolling)
        self._save()
        return asg.rolling.refresh.instance_refresh_id

    def describe_instance_refreshes(
        self, name: str, refresh_ids: Sequence[str] = ()
    ) -> Sequence[InstanceRefresh]:
        """Newest first."""
        _, asg = self._named(name)
        running = [asg.rolling.refresh] if asg.rolling else []
        return [
            one
            for one in running + asg.refreshes
            if not refresh_ids or one.instance_refresh_id in refresh_ids
        ]


def _template(config: GroupConfig) -> LaunchTemplate | None:
    mixed = config.mixed_instances_policy
    return mixed.launch_template if mixed else config.launch_template


def _none(name: str) -> ActiveInstanceRefreshNotFound:
    return ActiveInstanceRefreshNotFound(
        f"No in progress or pending Instance Refresh found for Auto Scaling group {name}"
    )


def _check(preferences: RefreshPreferences, wanted: DesiredConfiguration | None) -> None:
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
