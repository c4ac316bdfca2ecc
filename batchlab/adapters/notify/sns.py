"""A notification as a message of an SNS topic, by boto3 in a thread.

Invariant: a FIFO topic gets the notification's id to deduplicate by, and the job as its group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from batchlab import extras
from batchlab.errors import BackendError
from batchlab.notification import TOPIC, NotDelivered, Notification, Target

if TYPE_CHECKING:
    from batchlab.adapters.aws import Endpoint

FIFO = ".fifo"


class Topics:
    """Publishes to any of them; `endpoint_of` says where SNS of a region is."""

    def __init__(self, endpoint_of: Callable[[str], Endpoint]) -> None:
        self._endpoint_of = endpoint_of
        self._clients: dict[str, Any] = {}

    async def publish(self, target: Target, one: Notification) -> None:
        """Deliver; NotDelivered."""
        try:
            await asyncio.to_thread(self._publish, target, one)
        except BackendError as error:
            raise NotDelivered(error.message) from error

    def _publish(self, target: Target, one: Notification) -> None:
        from batchlab.adapters.aws import client, translated

        if module := extras.missing("aws", "boto3"):
            told = extras.sentence("aws", "A topic of SNS", module)
            raise NotDelivered(f"{told} {extras.anywhere('aws')}", final=True)
        found = TOPIC.fullmatch(target.to)
        if found is None:
            raise NotDelivered("Its target is no topic's ARN.", final=True)
        region = found[1]
        if region not in self._clients:
            self._clients[region] = client(self._endpoint_of(region), "sns", connections=1)
        more = {}
        if target.to.endswith(FIFO):
            more = {"MessageGroupId": one.job or "test", "MessageDeduplicationId": one.id}
        with translated("SNS"):
            self._clients[region].publish(
                TopicArn=target.to,
                Message=one.body,
                # For who reads it as a mail.
                Subject=f"batchlab: {one.job or 'test'} {one.moment}"[:100],
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": value}
                    for name, value in (
                        ("batchlab.id", one.id),
                        ("batchlab.moment", one.moment),
                        ("batchlab.job", one.job or "test"),
                    )
                },
                **more,
            )
