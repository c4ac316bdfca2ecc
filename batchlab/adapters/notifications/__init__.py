"""Delivery of notifications: webhooks, SNS topics, and commands of the grid.

Invariant: every failure of a delivery is a NotDelivered, and every wait has a limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from batchlab.core.notifications import NotDelivered, Notification, Target, problem

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.core.ports import Clock

log = logging.getLogger(__name__)


class Deliveries:
    """Delivery by the kind of the target. `endpoint_of` returns the endpoint of SNS in a region."""

    def __init__(self, clock: Clock, endpoint_of: Callable[[str], Endpoint]) -> None:
        from batchlab.adapters.notifications.sns_and_command import Topics, run
        from batchlab.adapters.notifications.webhook import Webhooks

        self._ways = {
            "webhook": Webhooks(clock).post,
            "sns": Topics(endpoint_of).publish,
            "command": run,
        }

    async def __call__(self, target: Target, one: Notification) -> None:
        """Deliver a notification, or raise NotDelivered."""
        # The target of a job comes from the bucket, so it is checked again.
        if one.own is not None and (wrong := problem(one.own)):
            raise NotDelivered(wrong, final=True)
        try:
            await self._ways[target.kind](target, one)
        except NotDelivered:
            raise
        except Exception as error:
            # A bug in the delivery to one target must not stop the manager.
            log.exception("a notification met a bug", extra={"job": one.job})
            raise NotDelivered(f"An error inside the manager: {type(error).__name__}.") from error
