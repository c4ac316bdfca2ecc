"""The warm pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchlab.fleet import warm
from batchlab.fleet.api import InstanceDetails, WarmPool
from batchlab.fleet.details import instance_details
from batchlab.fleet.faults import InstanceRefreshInProgress, ValidationError
from batchlab.fleet.requests import checks
from batchlab.fleet.requests.base import Requests
from batchlab.fleet.sources import Resting


class WarmPoolRequests(Requests):
    """As AWS's API reference says, under the same names."""

    def put_warm_pool(self, name: str, warm_pool: WarmPool) -> None:
        """Create or change it; instances that are in it stay in the state they are in."""
        _, asg = self._changeable(name)
        if asg.rolling is not None:
            raise InstanceRefreshInProgress(
                "The warm pool cannot be changed while an instance refresh is in progress."
            )
        checks.one_of("PoolState", warm_pool.pool_state, tuple(warm.RESTED))
        prepared = warm_pool.max_group_prepared_capacity
        # AWS's -1 turns the setting off.
        prepared = None if prepared is not None and prepared < 0 else prepared
        if warm_pool.min_size < 0:
            raise ValidationError("MinSize must not be negative.")
        if prepared is not None and prepared < max(warm_pool.min_size, asg.config.min_size):
            raise ValidationError(
                "MaxGroupPreparedCapacity must not be less than the MinSize of the warm pool or"
                " that of the group."
            )
        if warm_pool.pool_state != "Running" and not isinstance(self._launcher, Resting):
            raise ValidationError(
                f"This endpoint's instances cannot be {warm_pool.pool_state.lower()}; give the warm"
                " pool the PoolState Running."
            )
        asg.warm_pool = replace(warm_pool, max_group_prepared_capacity=prepared, status=None)
        self._changes.unsaved = True
        self._save()

    def delete_warm_pool(self, name: str, *, force_delete: bool = False) -> None:
        """Its instances are terminated, with `force_delete` at once, else with the next tick."""
        group, asg = self._changeable(name)
        if asg.warm_pool is None:
            raise ValidationError(f"No warm pool found for Auto Scaling group {name}")
        asg.warm_pool = replace(asg.warm_pool, status="PendingDelete")
        self._changes.unsaved = True
        if force_delete:
            warm.trim(self._changes, group, asg)
        self._save()

    def describe_warm_pool(self, name: str) -> tuple[WarmPool | None, Sequence[InstanceDetails]]:
        """Its configuration, None where there is none, and its instances."""
        group, asg = self._named(name)
        return asg.warm_pool, [instance_details(group, one) for one in warm.members(group)]
