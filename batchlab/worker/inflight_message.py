"""In-flight message of a worker, from its receive to its delete."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from batchlab.core.model import Bundle, Control
from batchlab.core.ports import Message
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.protocol.seals import UNSEALED, CommitKey
from batchlab.worker.runner import Handle


@dataclass(slots=True)
class InflightMessage:
    """In-flight message with monotonic times. `receipt` is None if the worker may not delete the
    message, because a watchdog message replaced it or the worker returned it."""

    queue: str
    message: Message
    task: TaskMessage
    execution: str
    received_s: float
    extended_s: float
    receipt: str | None
    key: CommitKey = UNSEALED
    """The commit key of its job, set once it is verified."""
    control: Control = Control.RUN
    handle: Handle = field(default_factory=Handle)
    waiting: asyncio.Future[bool] | None = None
    slots: int = 1
    alone: bool = False
    """Its next start decides whether it is a poison task, so it must run alone."""
    running: bool = False
    committing: bool = False
    shedding: bool = False
    """The tasks behind the running task are being handed off, or have been."""
    part: Bundle | None = None
    """The remaining part of the message's bundle after the other tasks were handed off."""
    trace: str = ""
    """Parent of its spans, a traceparent; "" if its job is not traced."""
    marked_s: float | None = None
    """When the running marker of a long-running bundle was last refreshed."""
    handed_over: bool = False
    """Its watchdog message has been sent."""

    @property
    def bundle(self) -> Bundle:
        return self.part or self.task.bundle

    @property
    def suspicion(self) -> int:
        """Number of earlier deliveries that ended without an outcome."""
        again = self.message.receive_count - 1
        return self.bundle.losses + again + (1 if self.task.watchdog else 0)
