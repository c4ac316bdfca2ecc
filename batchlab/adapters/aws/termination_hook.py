"""The hook that holds an instance while its worker hands back its work, completed from there.

An instance that nobody speaks for waits until the hook times out, and is paid for all that time.
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
    """The hook of one group, for the instance that `imds` tells of."""

    def __init__(self, endpoint: Endpoint, group: str, imds: Imds) -> None:
        self._endpoint = endpoint
        self._group = group
        self._imds = imds

    async def complete(self, patience: Patience) -> bool:
        """Let the instance go, where its group is taking it out; whether the group was told.

        A failure is logged, not raised: the hook then times out, which ends the instance as well.
        """
        try:
            if not await patience(partial(asyncio.to_thread, self._imds.is_leaving)):
                return False
            await patience(partial(asyncio.to_thread, self._tell))
        except Refused as error:
            if NO_ACTION not in str(error):
                log.warning("the group does not let this instance go: %s", error)
            return False  # else it ends already: the hook has timed out, or there is none
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
