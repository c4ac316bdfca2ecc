"""What a failed attempt has left in the bucket: its traceback, and what it printed.

Invariant: of each case at most two objects are asked for, and of its log no more than is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from batchlab.attempts import log_end
from batchlab.commit import outcome_at
from batchlab.commitkeys import CommitKeys
from batchlab.errors import NotFound
from batchlab.model import BundleId, JobId, Outcome, StageName
from batchlab.ports import Objects
from batchlab.protocol import naming
from batchlab.protocol.sealing import UNSEALED
from batchlab.report.html.failed import Case, Sample

LOG_BYTES = 8000
"""The end of what it printed, which is where it failed."""


async def samples(objects: Objects, job: str, cases: Iterable[Case]) -> dict[Case, Sample]:
    """Those of which the bucket still has the outcome. BackendError where the bucket cannot be
    asked."""
    found: dict[Case, Sample] = {}
    try:
        key = await CommitKeys(objects).stored(JobId(job))
    except NotFound:
        key = UNSEALED  # the job has been removed
    for case in cases:
        name = naming.outcome_of(JobId(job), StageName(case.stage), BundleId(case.bundle), key)
        try:
            outcome = outcome_at(name, await objects.get(name), key)
        except NotFound:
            continue
        found[case] = Sample(
            _traceback(outcome, case.task), await _log(objects, outcome, case.task)
        )
    return found


def _traceback(outcome: Outcome, task: int) -> str:
    return next((one.traceback for one in outcome.failed if one.task == task), "")


async def _log(objects: Objects, outcome: Outcome, task: int) -> str:
    try:
        data, before = await log_end(
            outcome, task, LOG_BYTES, partial(objects.get_range, outcome.log)
        )
    except NotFound:
        return ""
    text = data.decode(errors="replace")
    return f"… {before:,} bytes are left out …\n{text}" if before else text
