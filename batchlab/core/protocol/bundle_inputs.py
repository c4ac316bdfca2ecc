"""Inputs of a bundle, which come from its message, from an upstream outcome, from the stage's plan, or from the user.

Invariant: the manager, workers, and clients read a referenced object only after `JobObjects` has checked the reference.
References need a check because the reader of an outcome may have more rights than the worker that wrote the outcome.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from batchlab.core.commit import read_outcome
from batchlab.core.errors import Malformed, NotFound, TooNew, UsageError
from batchlab.core.job_definition import JobDef, task_name
from batchlab.core.model import Bundle, BundleId, JobId, Json, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import commit_keys, json_format, object_keys, values
from batchlab.core.protocol.field_checks import MAX_TASKS, UNREADABLE, bundle_name, list_items, name, text, whole
from batchlab.core.protocol.mended_inputs import MendedInput, mended_input
from batchlab.core.protocol.object_keys import CommitKey
from batchlab.core.text import count

T = TypeVar("T")

_MIN_PARTS = 4
_SAMPLE = 64
"""Number of items from which the size of a job's items is estimated."""
_MAX_BYTES = 8 * 1024 * 1024
"""Limit of the cached parts of plans in bytes. The cache always has room for `_MIN_PARTS` parts."""
_PART_BYTES = 1024
"""Bytes that each cached part counts in addition to its items. They limit the number of parts of single-item jobs."""
_MAX_MANIFESTS = 256


@dataclass(frozen=True, slots=True)
class Manifest:
    """Plan of a stage with `count` tasks. Part i of the plan has the inputs of the tasks from index `starts[i]` on.

    `parts` has the name of each part of the plan. In plans of release 0.1.0, `parts` is empty, and the parts have
    numbers as names.
    """

    count: int
    starts: tuple[int, ...]
    skipped: TaskSet = TaskSet()
    """Tasks that are canceled from the start, because an upstream task did not succeed."""
    round: int = 0
    parts: tuple[str, ...] = ()

    def part(self, number: int) -> str:
        """Return the name of part number `number` of the plan (see `object_keys.part`)."""
        return self.parts[number] if self.parts else object_keys.old_part(number)

    @classmethod
    def of_items(cls, items: Sequence[Json]) -> Manifest:
        """Return a plan with one part for the items that a job was submitted with."""
        return cls(len(items), (0,))

    def to_bytes(self) -> bytes:
        return json_format.to_bytes(
            {
                "v": json_format.VERSION,
                "count": self.count,
                "starts": self.starts,
                "skipped": json_format.tasks_to_json(self.skipped),
                "round": self.round,
                "parts": self.parts,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Return the plan in a document. Raise Malformed if the document is not a plan."""
        doc = json_format.loads(data)
        try:
            return _consistent(
                cls(
                    whole(doc["count"], MAX_TASKS),
                    tuple([whole(start, MAX_TASKS) for start in list_items(doc["starts"])]),
                    json_format.tasks_from_json(doc["skipped"]),
                    whole(doc["round"]),
                    tuple([text(part) for part in list_items(doc.get("parts", []))]),
                )
            )
        except UNREADABLE as error:
            raise Malformed(f"A stage's plan cannot be read: {json_format.brief(error)}.") from error


def _consistent(plan: Manifest) -> Manifest:
    """Return `plan` unchanged if it is consistent.

    Raise ValueError if the parts of the plan do not begin at 0, are not in order, or lack names. A plan without tasks
    may have an empty list of parts.
    """
    starts = plan.starts
    if (starts or plan.count) and starts[:1] != (0,):
        raise ValueError("its first part does not begin at task 0")
    if any(start >= later for start, later in pairwise(starts)):
        raise ValueError("a part of it begins before the part that precedes it")
    if plan.parts and len(plan.parts) != len(starts):
        raise ValueError(f"it names {len(plan.parts)} parts and has {len(starts)}")
    return plan


class NoSuchTask(NotFound):
    """Error for a task that is not in the plan of its stage."""


class Inputs:
    """Reader of the inputs of bundles. The reader caches the parts of plans that were used last, because many bundles
    need the same part.
    """

    def __init__(self, objects: Objects, patience: Patience) -> None:
        self._objects = objects
        self._patience = patience
        self._parts: OrderedDict[str, tuple[Sequence[Json], int]] = OrderedDict()
        """Items and approximate size in bytes of each cached part, by key."""
        self._bytes = 0
        self._manifests: OrderedDict[tuple[str, str, int], Manifest] = OrderedDict()

    async def resolve(self, job: JobDef, bundle: Bundle, key: CommitKey) -> Sequence[Json]:
        """Return the encoded input of each task of `bundle`.

        Raise NotFound if a required object does not exist. Raise Malformed if the bundle does not match the definition
        of its stage.
        """
        if mended := mended_input(bundle):
            return [await self._mended_item(job, bundle.stage, mended)]
        if bundle.source is not None:
            stage = job.stage(bundle.stage)
            if not stage.chained:
                raise Malformed(
                    f"Bundle {bundle.id} of job {job.id} names a source, and stage {stage.name} "
                    "does not follow another stage item by item."
                )
            return await self.values(job, stage.after[0], bundle.source, bundle.tasks, key)
        manifest = await self._manifest(job, bundle)
        items_found: list[Json] = []
        for start, stop in bundle.tasks.ranges:
            while start < stop:
                if start >= manifest.count:
                    raise _no_such_task(bundle, start, manifest)
                number = bisect_right(manifest.starts, start) - 1
                part = await self._part(job, bundle, manifest, number)
                offset = start - manifest.starts[number]
                items = part[offset : offset + stop - start]
                if not items:
                    raise _no_such_task(bundle, start, manifest)
                items_found += [await self._gather(job, i, key) if is_gather(i) else i for i in items]
                start += len(items)
        return items_found

    async def _mended_item(self, job: JobDef, stage: StageName, mended: MendedInput) -> Json:
        key = object_keys.mended_part(job.id, stage, mended.part)
        data = await self._patience(partial(self._objects.get, key))
        (item,) = _read_or_absent(key, data, partial(_items, mended.part))
        return item

    async def check(self, job: JobDef, bundle: Bundle) -> None:
        """Raise NoSuchTask if the plan of `bundle` does not have the bundle's last task.

        Raise NotFound if the plan does not exist yet.
        """
        manifest = await self._manifest(job, bundle)
        if bundle.tasks.last >= manifest.count:
            raise _no_such_task(bundle, bundle.tasks.last, manifest)

    async def values(
        self, job: JobDef, stage: StageName, bundle: BundleId, tasks: TaskSet, key: CommitKey
    ) -> list[Json]:
        """Return the committed results of `tasks` in an upstream bundle."""
        stored = object_keys.outcome_of(job.id, stage, bundle, key)
        outcome = await self._outcome(stored)
        by_task = dict(zip(outcome.succeeded, outcome.values, strict=True))
        if missing := tasks - outcome.succeeded:
            raise NotFound(f"{stored} does not have a result of task {missing.first}.")
        return [by_task[task] for task in tasks]

    async def _gather(self, job: JobDef, item: dict[str, Any], key: CommitKey) -> Json:
        """Return all results of the upstream stages in task order, as one list or as a dict with one list per stage."""
        lists: dict[str, list[Json]] = {}
        for stage, bundles in _gather_in(item).items():
            values: list[tuple[int, Json]] = []
            for bundle, tasks in bundles:
                got = await self.values(job, stage, bundle, tasks, key)
                values += zip(tasks, got, strict=True)
            values.sort(key=lambda pair: pair[0])
            lists[stage] = [value for _, value in values]
        return next(iter(lists.values())) if len(lists) == 1 else lists

    async def _outcome(self, name: str) -> Outcome:
        try:
            return await read_outcome(self._objects, name, self._patience)
        except Malformed as error:
            # An unreadable outcome counts as absent, so the task fails with a reason that names the object.
            raise NotFound(error.message) from error

    async def _manifest(self, job: JobDef, bundle: Bundle) -> Manifest:
        """Return the plan of the bundle's stage for the bundle's round, or for the latest earlier round that has a
        plan.
        """
        for round_ in range(bundle.round, -1, -1):
            known = self._manifests.get((bundle.job, bundle.stage, round_))
            if known:
                return known
            key = object_keys.manifest(bundle.job, bundle.stage, round_)
            try:
                data = await self._patience(partial(self._objects.get, key))
            except NotFound:
                continue
            manifest = _read_or_absent(key, data, Manifest.from_bytes)
            return self._keep_manifest(bundle.job, bundle.stage, manifest)
        return await self._load_manifest(job, bundle, key)

    async def _load_manifest(self, job: JobDef, bundle: Bundle, lost: str) -> Manifest:
        """Return the plan of a root stage of a job that was submitted with items.

        `lost` is the key of the missing plan object.
        """
        if job.stage(bundle.stage).after:
            what = f"Stage {bundle.stage} of job {bundle.job}"
            raise NotFound(f"{what} does not have a plan yet, or its plan was deleted: {lost}.")
        key = object_keys.spec(bundle.job)
        data = await self._patience(partial(self._objects.get, key))
        opening = _read_or_absent(key, data, lambda data: commit_keys.opening_in(json_format.loads(data)))
        if opening is None:
            what = f"The plan of stage {bundle.stage} of job {bundle.job}"
            raise NotFound(f"{what} no longer exists: {lost}.")
        return self.keep(bundle.job, bundle.stage, opening.items)

    def keep(self, job: JobId, stage: StageName, items: Sequence[Json]) -> Manifest:
        """Cache the items that a job was submitted with, and return their plan."""
        manifest = Manifest.of_items(items)
        sample = items[:_SAMPLE]
        size = len(json_format.dumps(sample)) * len(items) // max(1, len(sample))
        self._keep_part(object_keys.part(job, stage, 0, manifest.part(0)), items, size)
        return self._keep_manifest(job, stage, manifest)

    def _keep_manifest(self, job: JobId, stage: StageName, manifest: Manifest) -> Manifest:
        self._manifests[(job, stage, manifest.round)] = manifest
        while len(self._manifests) > _MAX_MANIFESTS:
            self._manifests.popitem(last=False)
        return manifest

    async def _part(self, job: JobDef, bundle: Bundle, manifest: Manifest, number: int) -> Sequence[Json]:
        key = object_keys.part(bundle.job, bundle.stage, manifest.round, manifest.part(number))
        if key not in self._parts:
            try:
                data = await self._patience(partial(self._objects.get, key))
            except NotFound:
                await self._load_manifest(job, bundle, key)
                if key not in self._parts:
                    raise
            else:
                items = _read_or_absent(key, data, partial(_items, manifest.part(number)))
                self._keep_part(key, items, len(data))
        self._parts.move_to_end(key)
        return self._parts[key][0]

    def _keep_part(self, key: str, items: Sequence[Json], size: int) -> None:
        size += _PART_BYTES
        _, former = self._parts.pop(key, ((), 0))
        self._parts[key] = items, size
        self._bytes += size - former
        while len(self._parts) > _MIN_PARTS and self._bytes > _MAX_BYTES:
            _, (_, oldest) = self._parts.popitem(last=False)
            self._bytes -= oldest


def _read_or_absent(key: str, data: bytes, read: Callable[[bytes], T]) -> T:
    """Return the result of `read` for the content `data` of the object `key`.

    An object that cannot be read counts as absent, so tasks that need the object fail with a reason that names the
    object.
    """
    try:
        return read(data)
    except (Malformed, TooNew) as error:
        raise NotFound(f"The object {key} cannot be read: {error.message}") from error


def _items(name: str, data: bytes) -> Sequence[Json]:
    """Return the items of a part of a plan. The name of the part is the digest of the part's content."""
    if len(name) == len(object_keys.name_digest(b"")) and object_keys.name_digest(data) != name:
        raise Malformed("Its content does not match its name.")
    try:
        return list_items(json_format.loads(data)["items"])
    except UNREADABLE as error:
        raise Malformed(f"It is not a part of a plan: {json_format.brief(error)}.") from error


def _gather_in(item: dict[str, Any]) -> dict[StageName, list[tuple[BundleId, TaskSet]]]:
    """Return the upstream tasks whose results the input `item` of a gather collects, by stage and bundle.

    Raise NotFound if the item cannot be read.
    """
    try:
        return {
            StageName(name(stage)): [
                (BundleId(bundle_name(bundle)), json_format.tasks_from_json(ranges))
                for bundle, ranges in list_items(bundles)
            ]
            for stage, bundles in item["$gather"].items()
        }
    except UNREADABLE as error:
        raise NotFound(f"An input of a plan cannot be read: {json_format.brief(error)}.") from error


def _no_such_task(bundle: Bundle, task: int, manifest: Manifest) -> NoSuchTask:
    name = task_name(bundle.stage, task)
    return NoSuchTask(
        f"The plan of job {bundle.job} does not contain task {name}.",
        remedy=f"Stage {bundle.stage} has {count(manifest.count, 'task')}, counted from 0.",
    )


def is_gather(item: Json) -> bool:
    """Return whether `item` is the input of a gather task, which collects the results of whole stages."""
    return isinstance(item, dict) and "$gather" in item


class ForeignReference(UsageError):
    """Error for a reference to an object that the job may not use, or whose content has changed."""


class JobObjects:
    """Objects that one job may use.

    A job of the Python API may also use files and raw data of other jobs, because a user may pass them as File objects.
    The job may also use the values that `Grid.put` has stored.
    """

    def __init__(self, job: JobId, inputs: Iterable[str] = (), *, is_python: bool) -> None:
        self._job = job
        keys = list(inputs)
        self._keys = frozenset(key for key in keys if not key.endswith("/"))
        plans = f"jobs/{job}/"
        folders = [key for key in keys if key.endswith("/")]
        others = ("files/", "raw/") if is_python else (f"files/{job}/", f"raw/{job}/")
        self._prefixes = (*others, plans, *folders)
        self.is_python = is_python

    @classmethod
    def of_job(cls, job: JobDef) -> JobObjects:
        """Return the objects that a job may use according to its definition."""
        keys = job.input.keys if job.input else ()
        return cls(job.id, keys, is_python=is_python(job))

    def key(self, reference: Json) -> str:
        """Return the object key in a reference. Raise ForeignReference if the job may not use the object."""
        name = reference.get(values.kind(reference) or "")
        if not isinstance(name, str) or not self._has(name):
            raise ForeignReference(
                f"A reference names {str(name)[:200]!r}, which is not an object of job {self._job}.",
                remedy="Tasks do not write such references. Check who may write to the bucket.",
            )
        return name

    def value(self, reference: Json, data: bytes) -> Json:
        """Return the encoded value in the object of a `$value` reference.

        Raise ForeignReference if the content of the object does not match the hash in the reference.
        """
        digest = reference.get("sha256")
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise ForeignReference(
                f"The object {reference['$value']!r} is not the one that a task stored there.",
                remedy="Another program has replaced the object. Run the job again.",
            )
        return json.loads(data)

    def _has(self, key: str) -> bool:
        if key in self._keys or (self.is_python and object_keys.is_shared_value(key)):
            return True
        return key.startswith(self._prefixes) and not any(part in ("", ".", "..") for part in key.split("/"))


def is_python(job: JobDef) -> bool:
    """Return whether the job comes from the Python API, which may pickle items and results."""
    return any((stage.handler or "").startswith("pickle:") for stage in job.stages)
