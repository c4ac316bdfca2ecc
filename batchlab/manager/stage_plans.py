"""Plans of stages, whose input parts are committed by one conditional PUT of the manifest.

Invariant: the names of parts and large items are derived from their content, and the manifest lists the parts of the
plan. Two managers that plan the same stage do not overwrite each other's parts, even if their inputs differ. The first
committed manifest is the plan for both managers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial
from operator import itemgetter

from batchlab.core.commit import deletions, is_deleted, read_outcome, sweep_time
from batchlab.core.errors import AlreadyExists, Malformed, NotFound, TooLarge, Unreachable, UsageError
from batchlab.core.job_definition import JobDef, StageDef, task_name
from batchlab.core.model import JobId, Json, Outcome, StageCounts, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import BundleRecord, Cut, Objects
from batchlab.core.protocol import commit_keys, json_format, object_keys, values
from batchlab.core.protocol.bundle_inputs import JobObjects, Manifest, is_gather
from batchlab.core.protocol.field_checks import UNREADABLE
from batchlab.manager import input_split
from batchlab.manager.quarantine import read_stored
from batchlab.manager.state import Ports

PART_ITEMS = 4096
PART_BYTES = 1_000_000
PARTS_PER_PAUSE = 4
"""Number of parts written before other asyncio tasks run, which takes about 50 ms."""
MAX_STORED_ITEMS = 10_000
MAX_STORED_BYTES = 100_000
"""Maximum size of the items stored with the job's definition, because the manager reads the definition again after the
loss of a worker."""

ITEM_BYTES = 100_000
"""Maximum size of an item in a part. A larger item, such as a gathered group, is a separate object, which only the
item's worker loads."""

RESULT_WEIGHT = 4 * values.OUTCOME_WEIGHT
"""Maximum weight of one large result that the manager reads for a gather by field or a join."""


async def successful_bundles(ports: Ports, job: JobId, counts: StageCounts) -> list[BundleRecord]:
    """Return a stage's bundles with results, ordered by task. Raise Unreachable if the ledger's results do not match
    `counts`, because a plan made during a rebuild would be incomplete."""
    records = await ports.ledger.bundles(job, stage=counts.stage, done=True)
    bundle_records = [r for r in records if r.completion and r.completion.succeeded]
    if sum(len(r.completion.succeeded) for r in bundle_records if r.completion) != counts.succeeded:
        raise Unreachable(
            f"The ledger lacks results of stage {counts.stage} of job {job}.",
            remedy="If no rebuild is running, start one with `batchlab grid rebuild-ledger`.",
        )
    # The bundles are sorted by task, because the plan must not depend on the order of arrival.
    return sorted(bundle_records, key=lambda r: r.completion.succeeded.first if r.completion else 0)


class StagePlans:
    def __init__(self, ports: Ports) -> None:
        self._ports = ports

    async def read(self, job: JobDef, stage: StageName, round: int) -> Manifest | None:
        """Return the committed plan of the stage for a round, or None without a committed plan."""
        key = object_keys.manifest(job.id, stage, round)
        try:
            return await read_stored(self._ports, key, Manifest.from_bytes)
        except NotFound:
            # The plan of a job with few items is stored with the job's definition.
            came = job.items is not None and round == 0 and not job.stage(stage).after
            return await self._load_manifest(job) if came else None

    async def _load_manifest(self, job: JobDef) -> Manifest | None:
        opening = await self._opening(job)
        return Manifest.of_items(opening.items) if opening else None

    async def opening_cut(self, job: JobDef, cut: Cut) -> Cut | None:
        """Return the first cut of a stage if the cut was committed together with the job's definition, else None."""
        if cut.seq or cut.round or job.items is None:
            return None
        opening = await self._opening(job)
        first = opening.cut if opening else None
        return first if first and first.stage == cut.stage else None

    async def _opening(self, job: JobDef) -> commit_keys.Opening | None:
        def opening(data: bytes) -> commit_keys.Opening | None:
            return commit_keys.opening_in(json_format.loads(data))

        try:
            return await read_stored(self._ports, object_keys.spec(job.id), opening)
        except NotFound:
            return None

    async def plan_input(self, job: JobDef, stage: StageDef) -> Manifest:
        """Plan a root stage from the job's raw input. Raise UsageError if the input is malformed or belongs to a
        deleted job, and Unreachable while a job to which a part of the input belongs is being deleted."""
        assert job.input is not None
        for owner in sorted(object_keys.owners(job.input.keys) - {job.id}):
            await self._check_owner(owner)
        if object_keys.spans_jobs(job.input.keys):
            await self._check_deletions()
        return await self._write(job, stage.name, 0, input_split.items(self._ports.objects, job.input))

    async def _check_owner(self, owner: JobId) -> None:
        # The request is read first, because it disappears only after the note has replaced the definition.
        objects, patience = self._ports.objects, self._ports.patience
        request = await patience(partial(objects.head, object_keys.deletion(owner)))
        if await patience(partial(is_deleted, objects, owner)):
            raise UsageError(
                f"The input belongs to job {owner}, which was deleted.",
                remedy="Submit the job again with input of its own.",
            )
        if request:
            raise Unreachable(f"The input belongs to job {owner}, which is being deleted.")

    async def _check_deletions(self) -> None:
        """Raise Unreachable while any job is being deleted. A deletion that begins later finds the planned job."""
        async for owner in deletions(self._ports.objects):
            if await self._ports.patience(partial(sweep_time, self._ports.objects, owner)) is None:
                raise Unreachable(f"The input has objects of all jobs, and job {owner} is being deleted.")

    async def plan_stage(
        self, job: JobDef, stage: StageDef, round: int, counts: Mapping[StageName, StageCounts]
    ) -> Manifest:
        """Plan a stage after all upstream stages have ended with `counts`."""
        if stage.gather == "*":
            items: AsyncIterator[Json] = self._gather_all(job, stage, counts)
        elif stage.gather is not None:
            items = self._gather_by(job, stage, stage.gather, counts)
        else:
            return await self._join(job, stage, round, counts)
        return await self._write(job, stage.name, round, items)

    async def _gather_all(
        self, job: JobDef, stage: StageDef, counts: Mapping[StageName, StageCounts]
    ) -> AsyncIterator[Json]:
        bundles = {
            upstream: [
                [r.bundle.id, json_format.tasks_to_json(r.completion.succeeded)]
                for r in await successful_bundles(self._ports, job.id, counts[upstream])
                if r.completion
            ]
            for upstream in stage.after
        }
        yield {"$gather": bundles}

    async def _gather_by(
        self, job: JobDef, stage: StageDef, field: str, counts: Mapping[StageName, StageCounts]
    ) -> AsyncIterator[Json]:
        groups: dict[str, list[Json]] = {}
        for upstream in stage.after:
            results = [pair async for pair in self._values(job, counts[upstream])]
            # The results are sorted by task, because a bundle may have several task ranges, and a retried task is in a
            # separate bundle.
            for task, value in sorted(results, key=itemgetter(0)):
                for element in value if isinstance(value, list) else [value]:
                    if not isinstance(element, dict) or field not in element:
                        raise UsageError(
                            f"Stage {stage.name} gathers by {field!r}, but the result of task "
                            f"{task_name(upstream, task)} lacks this field.",
                            remedy=f"Return objects with {field!r}, or lists of them.",
                        )
                    groups.setdefault(str(element[field]), []).append(element)
        for key in sorted(groups):
            yield groups[key]

    async def _join(
        self, job: JobDef, stage: StageDef, round: int, counts: Mapping[StageName, StageCounts]
    ) -> Manifest:
        planned = {u: counts[u].planned or 0 for u in stage.after}
        if len(set(planned.values())) > 1:
            numbers = ", ".join(f"{u} has {planned[u]}" for u in stage.after)
            raise UsageError(
                f"Stage {stage.name} follows several stages item by item, but these differ in "
                f"their number of tasks: {numbers}.",
                remedy="Gather them, or let them have one common input.",
            )
        count = planned[stage.after[0]]
        rows: list[dict[str, Json]] = [{} for _ in range(count)]
        for upstream in stage.after:
            async for task, value in self._values(job, counts[upstream]):
                rows[task][upstream] = value
        skipped = TaskSet.from_indices(i for i, row in enumerate(rows) if len(row) < len(stage.after))
        return await self._write(job, stage.name, round, _each(rows), skipped=skipped)

    async def _values(self, job: JobDef, counts: StageCounts) -> AsyncIterator[tuple[int, Json]]:
        """Yield the number and encoded result of each successful task of a stage. The generator reads large results
        from their objects."""
        stage = counts.stage
        key, own = await self._ports.keys.key_of(job), JobObjects.of_job(job)
        for record in await successful_bundles(self._ports, job.id, counts):
            outcome = await self._outcome(stage, object_keys.outcome(record.bundle, key))
            for task, value in zip(outcome.succeeded, outcome.values, strict=True):
                if values.kind(value) == "$value":
                    yield task, await self._result(stage, own, value)
                else:
                    yield task, value

    async def _outcome(self, stage: StageName, key: str) -> Outcome:
        try:
            return await read_outcome(self._ports.objects, key, self._ports.patience)
        except (NotFound, Malformed) as error:
            raise _missing_results(stage, error) from error

    async def _result(self, stage: StageName, own: JobObjects, reference: Json) -> Json:
        """Return a large result from its object. The object is checked, because a worker may have written an object of
        any size and content."""
        key = own.key(reference)
        get = partial(self._ports.objects.get, key, limit=RESULT_WEIGHT)
        try:
            data = await self._ports.patience(get)
            if values.weight(data.decode("latin-1")) > RESULT_WEIGHT:
                raise TooLarge(f"its {len(data)} bytes need too much memory")
            return own.value(reference, data)
        except NotFound as error:
            raise _missing_results(stage, error) from error
        except (TooLarge, *UNREADABLE) as error:
            raise _missing_results(stage, json_format.unreadable(key, error)) from error

    async def _write(
        self, job: JobDef, stage: StageName, round: int, items: AsyncIterator[Json], *, skipped: TaskSet | None = None
    ) -> Manifest:
        writer = PartWriter(self._ports.objects, self._ports.patience, job.id, stage, round)
        async for item in items:
            await writer.add(item)
        return await writer.commit(skipped or TaskSet())


class PartWriter:
    """Writer of a plan's parts in constant memory, and of the plan's manifest at the end."""

    def __init__(self, objects: Objects, patience: Patience, job: JobId, stage: StageName, round: int) -> None:
        self._objects = objects
        self._patience = patience
        self._job = job
        self._stage = stage
        self._round = round
        self._starts: list[int] = []
        self._parts: list[str] = []
        self._count = 0
        self._items: list[Json] = []
        self._bytes = 0

    async def add(self, *items: Json) -> None:
        for item, size in zip(items, map(values.roughly, items), strict=True):
            if size > ITEM_BYTES and not is_gather(item):
                item, size = await self._store_large_item(item)
            if not self._items:
                self._starts.append(self._count)
            self._items.append(item)
            self._count += 1
            self._bytes += size
            if len(self._items) >= PART_ITEMS or self._bytes >= PART_BYTES:
                await self._flush()

    async def _store_large_item(self, item: Json) -> tuple[Json, int]:
        """Return the item and the item's size. Store an item that is larger than `ITEM_BYTES` in a separate object, and
        return a reference to the object instead."""
        data = json_format.to_bytes(item)
        if len(data) <= ITEM_BYTES:
            return item, len(data)
        key = object_keys.item(self._job, self._stage, self._round, object_keys.name_digest(data))
        await self._patience(partial(self._objects.put, key, data))
        return values.value_ref(key), 0

    async def commit(self, skipped: TaskSet) -> Manifest:
        """Commit the manifest, and return the committed manifest, which another manager may have written."""
        await self._flush()
        parts = tuple(self._parts)
        manifest = Manifest(self._count, tuple(self._starts), skipped, self._round, parts)
        key = object_keys.manifest(self._job, self._stage, self._round)
        objects, patience = self._objects, self._patience
        try:
            await patience(lambda: objects.put(key, manifest.to_bytes(), if_absent=True))
        except AlreadyExists:
            return Manifest.from_bytes(await patience(lambda: objects.get(key)))
        return manifest

    async def _flush(self) -> None:
        if not self._items:
            return
        data = json_format.to_bytes({"v": json_format.VERSION, "items": self._items})
        self._parts.append(object_keys.name_digest(data))
        key = object_keys.part(self._job, self._stage, self._round, self._parts[-1])
        await self._patience(partial(self._objects.put, key, data))
        self._items, self._bytes = [], 0
        if len(self._parts) % PARTS_PER_PAUSE == 0:
            # The pause lets other asyncio tasks run, because this asyncio task may not have waited for any read or
            # write.
            await asyncio.sleep(0)


def _missing_results(stage: StageName, error: Exception) -> UsageError:
    how = "have vanished from" if isinstance(error, NotFound) else "cannot be read from"
    return UsageError(f"The results of stage {stage} {how} the bucket: {error}", remedy="Submit the job again.")


async def _each(rows: Iterable[Json]) -> AsyncIterator[Json]:
    for row in rows:
        yield row
