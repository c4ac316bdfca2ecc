"""Reader of a job's data in the bucket: definition, cuts, outcomes, end, and recorded data.

Invariants: the reader reads only the bucket, so the tables of a job can be built again at any time with the same
result. Only a few outcomes are in memory at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.job_definition import JobDef
from batchlab.core.model import JobId, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Cut, Ending, Objects
from batchlab.core.pricing.usage import Account
from batchlab.core.protocol import commit_keys, json_format, object_keys
from batchlab.core.protocol.commit_keys import CommitKeys
from batchlab.manager import recorded_data
from batchlab.manager.retry_rounds import Retry
from batchlab.reports.tables.staging import Staging, planned_tasks

MAX_FETCHES = 8
"""Number of objects that are fetched concurrently. The number is low, because the manager also sends other requests."""
MAX_BATCH = 64
MAX_BATCH_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class JobData:
    """Data of a job that is not in the staged files.

    `account` is None if the usage of the job was not recorded. `planned` contains the tasks of each planned stage.
    `began_s` is the start of the last round.
    """

    job: JobDef
    round: int
    ending: Ending | None
    planned: dict[StageName, TaskSet]
    account: Account | None
    record: recorded_data.RecordedData
    results_twice: dict[StageName, int]
    began_s: float


class JobDataReader:
    """Reader of the data of jobs in one bucket."""

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._keys = CommitKeys(objects, patience)

    async def gather(self, job: JobId, folder: Path) -> JobData:
        """Read the job. Stage the data that grows with the size of the job in `folder`.

        Raise UsageError if the bucket does not contain the job.
        """
        try:
            doc = await self._doc(object_keys.spec(job))
        except NotFound:
            raise UsageError(
                f"The bucket has nothing of a job {job}.",
                remedy="`batchlab job list` shows the jobs of the grid that is up.",
            ) from None
        spec, opening = json_format.job_from_json(doc), commit_keys.opening_in(doc)
        retries = await self._retries(job)
        void_before = {
            reopening.stage: number
            for number, retry in enumerate(retries, start=1)
            for reopening in retry.reopened
            if reopening.replan
        }
        submitted_s = max(spec.submitted_s, spec.start_at_s or 0.0)
        cuts = [opening.cut] if opening and opening.cut else []
        cuts += [cut for retry in retries for cut in retry.cuts]
        with await asyncio.to_thread(Staging, folder, spec, void_before) as staging:
            await self._outcomes(spec, staging, cuts)
            if spec.after:
                # A dependent job begins with its first cut.
                submitted_s = max(submitted_s, min((cut.at_s for cut in cuts if cut.at_s), default=submitted_s))
            planned = planned_tasks(spec, cuts, void_before)
            await asyncio.to_thread(_plan, staging, cuts, planned, submitted_s)
        account, record = await self._usage(job)
        again_s = [cut.at_s for cut in retries[-1].cuts if cut.at_s] if retries else []
        return JobData(
            spec,
            len(retries),
            await self._ending(job, len(retries)),
            planned,
            account,
            record,
            staging.results_twice,
            min(again_s, default=submitted_s),
        )

    async def _doc(self, key: str) -> dict[str, Any]:
        return json_format.loads(await self._patience(partial(self._objects.get, key)))

    async def _retries(self, job: JobId) -> list[Retry]:
        retries: list[Retry] = []
        while True:
            get = partial(self._objects.get, object_keys.retry(job, len(retries) + 1))
            try:
                retries.append(Retry.from_bytes(await self._patience(get)))
            except NotFound:
                return retries

    async def _ending(self, job: JobId, round_: int) -> Ending | None:
        try:
            return json_format.ending_from_json(await self._doc(object_keys.final(job, round_)))
        except NotFound:
            return None

    async def _outcomes(self, job: JobDef, staging: Staging, cuts: list[Cut]) -> None:
        """Stage every outcome of the job, and append every cut to `cuts`."""
        key = await self._keys.key_of(job)
        batch_bytes = 0
        batch: list[str] = []
        async for page in self._objects.list(object_keys.committed(job.id)):
            for info in page:
                if object_keys.is_cut(info.key):
                    cuts.append(json_format.cut_from_json(await self._doc(info.key)))
                elif object_keys.is_genuine(info.key, key):
                    batch.append(info.key)
                    batch_bytes += info.size
                if len(batch) >= MAX_BATCH or batch_bytes >= MAX_BATCH_BYTES:
                    await self._stage(batch, staging)
                    batch, batch_bytes = [], 0
        await self._stage(batch, staging)

    async def _stage(self, keys: Sequence[str], staging: Staging) -> None:
        for i in range(0, len(keys), MAX_FETCHES):
            gets = [partial(self._objects.get, key) for key in keys[i : i + MAX_FETCHES]]
            outcomes = await asyncio.gather(*(self._patience(get) for get in gets))
            await asyncio.to_thread(_stage_outcomes, staging, outcomes)

    async def _usage(self, job: JobId) -> tuple[Account | None, recorded_data.RecordedData]:
        """Return the usage of the job, and the data that was recorded while the job ran."""
        try:
            doc = await self._doc(object_keys.reference_key(job))
            return Account.from_json(doc["account"]), doc.get("record") or recorded_data.empty_part()
        except NotFound:
            pass  # the job still runs, or an older manager ended it without a usage object
        account, record = None, recorded_data.empty_part()
        try:
            doc = await self._doc(object_keys.USE)
            if job in doc["jobs"]:
                account = Account.from_json(doc["jobs"][job])
            record = recorded_data.job_part(await self._doc(object_keys.RECORD), job)
        except NotFound:
            pass  # the grid does not record usage
        return account, record


def _stage_outcomes(staging: Staging, outcomes: Sequence[bytes]) -> None:
    for data in outcomes:
        staging.outcome(data)


def _plan(staging: Staging, cuts: Sequence[Cut], planned: dict[StageName, TaskSet], submitted_s: float) -> None:
    for cut in cuts:
        staging.cut(cut, submitted_s)
    for stage, tasks in planned.items():
        staging.rest(stage, tasks)
