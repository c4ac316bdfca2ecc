"""Delivery of a notification to an SNS topic or to a command.

Invariant for topics: a message to a FIFO topic has the notification's id for deduplication, and the
job as its group. boto3 blocks, so it runs in a thread.

Invariant for commands: only the grid's settings name commands. A command runs without a shell, and
no text of a job is among its arguments. It reads the notification from its standard input. At its
timeout it is killed with all processes that it started.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from batchlab.core import optional_dependencies
from batchlab.core.errors import BackendError
from batchlab.core.notifications import TOPIC, NotDelivered, Notification, Target

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint

FIFO = ".fifo"


class Topics:
    """Publisher to SNS topics. `endpoint_of` returns the endpoint of SNS in a region."""

    def __init__(self, endpoint_of: Callable[[str], Endpoint]) -> None:
        self._endpoint_of = endpoint_of
        self._clients: dict[str, Any] = {}

    async def publish(self, target: Target, one: Notification) -> None:
        """Deliver a notification, or raise NotDelivered."""
        try:
            await asyncio.to_thread(self._publish, target, one)
        except BackendError as error:
            raise NotDelivered(error.message) from error

    def _publish(self, target: Target, one: Notification) -> None:
        from batchlab.adapters.aws.endpoint import client, translated

        if module := optional_dependencies.missing("aws", "boto3"):
            told = optional_dependencies.sentence("aws", "A topic of SNS", module)
            raise NotDelivered(f"{told} {optional_dependencies.anywhere('aws')}", final=True)
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
                # The subject is for subscribers by mail.
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


WHOLE_S = 30.0
TOLD_BYTES = 4096
"""Number of bytes that are read from the end of a command's error output."""


async def run(target: Target, one: Notification) -> None:
    """Deliver a notification. Raise NotDelivered unless the command exits with status 0."""
    environment = {
        **os.environ,
        "BATCHLAB_NOTIFICATION": one.id,
        "BATCHLAB_MOMENT": one.moment,
        "BATCHLAB_JOB": one.job,
        "BATCHLAB_ATTEMPT": str(one.attempts + 1),
    }
    # A pipe is unsuitable, because a process that the command leaves running could keep it open.
    with tempfile.TemporaryFile() as said:
        try:
            process = await asyncio.create_subprocess_exec(
                *target.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=said,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise NotDelivered(
                f"The program {target.command[0]!r} cannot be run: {error.strerror}."
            ) from error
        try:
            async with asyncio.timeout(WHOLE_S):
                await _told(process, one.body.encode())
                status = await process.wait()
        except TimeoutError:
            raise NotDelivered(f"It had not ended after {WHOLE_S:.0f} s.") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if status:
            last = _last_line(said.fileno())
            raise NotDelivered(f"It ended with status {status}{f': {last}' if last else ''}.")


async def _told(process: asyncio.subprocess.Process, body: bytes) -> None:
    assert process.stdin
    with suppress(BrokenPipeError, ConnectionResetError):  # the command need not read its input
        process.stdin.write(body)
        await process.stdin.drain()
    process.stdin.close()


def _last_line(file: int) -> str:
    size = os.fstat(file).st_size
    text = os.pread(file, TOLD_BYTES, max(0, size - TOLD_BYTES)).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")[:200].rstrip(".")
