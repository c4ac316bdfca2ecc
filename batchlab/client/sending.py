"""Sending of a batch of an executor's calls: pack it, submit it, and receive its first results.

Invariant: an accepted batch stays accepted, even if the answer with its first results fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from batchlab.client.futures import Batch, Call, Packer
from batchlab.client.grid_link import Link
from batchlab.client.results import outcomes
from batchlab.client.submission import MAP, Outgoing, job_name
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.job_definition import RetryRule, StageDef
from batchlab.core.model import Outcome
from batchlab.core.protocol import json_format
from batchlab.worker.executor_calls import Initializer

if TYPE_CHECKING:
    from batchlab.core.api_types import OutcomesView

FIRST_S = 0.2
"""Time in seconds that the submission of a batch waits for first results. Short calls need no
second request."""

Tell = Callable[[str, Outcome], None]
"""Callback that receives a job's outcome."""


class Sender:
    """Sender of the batches of one executor. Each call runs on the caller's thread."""

    def __init__(
        self, link: Link, outgoing: Outgoing, name: str | None, initializer: Initializer | None
    ) -> None:
        """`name` is the name of the jobs."""
        self._link = link
        self._outgoing = outgoing
        self._packer = Packer(outgoing.shipping, initializer)
        self._name = name

    def send(
        self, batch: Batch, calls: Sequence[Call], accepted: Callable[[], None], tell: Tell
    ) -> int | None:
        """Submit the calls as the batch's job, if any of them can be packed. Return the seq of the
        last outcome that `tell` received.

        `accepted` is called once, when the batch has its job. Raise the error that prevents the
        submission. After the batch is accepted, raise nothing.
        """
        stage = StageDef(MAP, retry=RetryRule(attempts=1), bundle=batch.bundle)
        draft = self._outgoing.draft(job_name(calls[0].function, self._name), stage)
        packed = self._packer.pack(draft.id, calls)
        batch.open = dict(enumerate(packed.futures))
        batch.rejected = packed.rejected

        def note() -> None:
            if not batch.job:
                batch.job = draft.id
                accepted()

        try:
            page = self._outgoing.send(draft, packed.handler, packed.chunks, note, wait_s=FIRST_S)
            return self._hear(batch, page, tell) if page else None
        except (BackendError, UsageError):
            if not batch.job:
                raise
            return None  # the watch of the job will meet the same error

    def _hear(self, batch: Batch, page: OutcomesView, tell: Tell) -> int | None:
        listed = page["outcomes"]

        async def read() -> None:
            async for outcome in outcomes(self._link, listed):
                tell(batch.job, outcome)

        if all(one["outcome"] for one in listed):
            for one in listed:
                tell(batch.job, json_format.outcome_from_json(one["outcome"]))
        else:
            self._link.run(read())
        return listed[-1]["seq"] if listed else None
