"""Completion of the lifecycle hook that holds a terminating instance.

The hook holds the instance while its worker returns its work. Without a completion, the instance
waits until the hook times out, and its whole wait is billed.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from batchlab.adapters.aws.endpoint import Endpoint, client, translated
from batchlab.adapters.aws.group_template import DRAIN_HOOK, NO_ACTION
from batchlab.adapters.aws.instance_metadata import Imds
from batchlab.core.errors import BackendError, Refused
from batchlab.core.retry import Patience

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
