"""The ways to a target: webhooks, topics of SNS, commands of the grid's own.

Invariant: whatever goes wrong on the way is a NotDelivered, and waits for a target end in time.
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
    """Delivers by the target's kind; `endpoint_of` says where SNS of a region is."""

    def __init__(self, clock: Clock, endpoint_of: Callable[[str], Endpoint]) -> None:
        from batchlab.adapters.notifications.sns_and_command import Topics, run
        from batchlab.adapters.notifications.webhook import Webhooks

        self._ways = {
            "webhook": Webhooks(clock).post,
            "sns": Topics(endpoint_of).publish,
            "command": run,
        }

    async def __call__(self, target: Target, one: Notification) -> None:
        """Returns once it is delivered; NotDelivered."""
        # Whoever has written what is in the bucket.
        if one.own is not None and (wrong := problem(one.own)):
            raise NotDelivered(wrong, final=True)
        try:
            await self._ways[target.kind](target, one)
        except NotDelivered:
            raise
        except Exception as error:
            # A bug, met on the way to one target: it must not take the grid with it.
            log.exception("a notification met a bug", extra={"job": one.job})
            raise NotDelivered(f"An error inside the manager: {type(error).__name__}.") from error
