"""A message in a worker's hands, from its receive to its delete."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from batchlab.core.model import Bundle, Control
from batchlab.core.ports import Message
from batchlab.core.protocol.messages import TaskMessage
from batchlab.core.protocol.seals import UNSEALED, CommitKey
from batchlab.worker.runner import Handle


@dataclass(slots=True)
class Hand:
    """All times monotonic. `receipt` is None once the message is no longer ours to delete: it was
    handed over to a watchdog, or given back."""

    queue: str
    message: Message
    task: TaskMessage
    execution: str
    received_s: float
    extended_s: float
    receipt: str | None
    key: CommitKey = UNSEALED
    """The commit key of its job, once that has been checked."""
    control: Control = Control.RUN
    handle: Handle = field(default_factory=Handle)
    waiting: asyncio.Future[bool] | None = None
    slots: int = 1
    alone: bool = False
    """Its next start decides whether it is poison: nobody is to be beside it then."""
    running: bool = False
    committing: bool = False
    shedding: bool = False
    """What waits behind the running task is being given away, or has been."""
    part: Bundle | None = None
    """What is left of the message's bundle, once the rest has been given away."""
    trace: str = ""
    """What is done for it goes below this, a traceparent; "" where its job is not traced."""
    marked_s: float | None = None
    """When the running marker of a bundle that runs for long was last refreshed."""
    handed_over: bool = False
    """Its watchdog message is on the way."""

    @property
    def bundle(self) -> Bundle:
        return self.part or self.task.bundle

    @property
    def suspicion(self) -> int:
        """Deliveries before this one that ended without an outcome."""
        again = self.message.receive_count - 1
        return self.bundle.losses + again + (1 if self.task.watchdog else 0)
