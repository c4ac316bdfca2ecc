"""Check and storage of mended inputs, which users give to failed tasks of a retry.

Invariant: a mended input has the kind of the task's former input. If the former input is a file or a part of a file,
the mended input is a file with the same name. Otherwise, the mended input is a JSON value.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import partial

from batchlab.core.errors import AlreadyExists, Malformed, NotFound, UsageError
from batchlab.core.job_definition import JobDef, SplitBy, task_name
from batchlab.core.model import Bundle, BundleId, Json, StageName, TaskSet
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.mended_inputs import MAX_INPUT_BYTES, MendedInput, TaskInputs
from batchlab.core.text import size
from batchlab.manager.stage_plans import ITEM_BYTES
from batchlab.manager.state import Ports

_FILE_NAME = "input"
"""Name of a mended file whose former input is lost."""


def check_sizes(inputs: TaskInputs) -> None:
    """Raise UsageError if a mended input is too large."""
    for (stage, task), data in inputs.items():
        if len(data) > MAX_INPUT_BYTES:
            raise UsageError(
                f"The input of task {task_name(stage, task)} has {size(len(data))}, and the limit of a new input is "
                f"{size(MAX_INPUT_BYTES)}.",
                remedy="Submit a job of its own for larger input.",
            )


class MendedInputs:
    """Writer of the mended inputs of one job."""

    def __init__(self, ports: Ports, job: JobDef) -> None:
        self._ports = ports
        self._job = job

    async def store(self, failed: Bundle, task: int, data: bytes) -> BundleId:
        """Store the mended input of a failed task, and return the source of the bundle that runs the task. `failed` is
        the bundle in which the task failed. Raise UsageError if `data` does not have the kind of the task's input."""
        alone = Bundle(failed.job, failed.stage, TaskSet.from_indices([task]), round=failed.round, source=failed.source)
        former = await self._former(alone)
        sha256 = hashlib.sha256(data).hexdigest()
        if _is_file(self._job, failed.stage, former):
            key = object_keys.mended_file(self._job.id, failed.stage, sha256)
            name = former["name"] if values.kind(former) else _FILE_NAME
            await self._put(key, data)
            item = values.file_ref(key, name, len(data))
        else:
            item = await self._value(failed.stage, task, data)
        content = json_format.to_bytes({"v": json_format.VERSION, "items": [item]})
        part = object_keys.name_digest(content)
        await self._put(object_keys.mended_part(self._job.id, failed.stage, part), content)
        return MendedInput(part, len(data), sha256).source

    async def _former(self, bundle: Bundle) -> Json:
        """Return the former input of the bundle's only task, or None if the input is lost or gathered."""
        if self._job.stage(bundle.stage).gather == "*":
            return None  # The input may have the size of the results of whole stages.
        inputs = Inputs(self._ports.objects, self._ports.patience)
        with suppress(NotFound, Malformed):
            (item,) = await inputs.resolve(self._job, bundle, await self._ports.keys.key_of(self._job))
            return item
        return None

    async def _value(self, stage: StageName, task: int, data: bytes) -> Json:
        name = task_name(stage, task)
        if json_format.is_too_heavy(data):
            raise UsageError(
                f"The new input of task {name} has too many JSON arrays and objects.",
                remedy="Submit a job of its own for larger input.",
            )
        try:
            item = values.encode(json.loads(data.decode("utf-8-sig")), what=f"The input of task {name}")
            encoded = json_format.to_bytes(item)
        except values.NotAValue as error:
            raise UsageError(error.message, remedy=error.remedy) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"The new input of task {name} is not JSON: {json_format.brief(error)}.",
                remedy='The input of this task is one JSON value, such as {"n": 3} or "text" in quotes.',
            ) from error
        raw = None if self._job.stage(stage).after else self._job.input
        if raw and raw.split is SplitBy.ITEMS and raw.size > 1 and not isinstance(item, list):
            raise UsageError(
                f"The new input of task {name} is not a JSON array.",
                remedy=f"The input of this task is an array of at most {raw.size} items.",
            )
        if len(encoded) <= ITEM_BYTES:
            return item
        sha256 = hashlib.sha256(encoded).hexdigest()
        key = object_keys.mended_file(self._job.id, stage, sha256)
        await self._put(key, encoded)
        return values.value_ref(key, sha256)

    async def _put(self, key: str, data: bytes) -> None:
        put = partial(self._ports.objects.put, key, data, if_absent=True)
        with suppress(AlreadyExists):  # The key is a digest of the content, so the object has the same content.
            await self._ports.patience(put)


def _is_file(job: JobDef, stage: StageName, former: Json) -> bool:
    if former is not None:
        return values.kind(former) in ("$file", "$part")
    return bool(job.input and job.input.split is not SplitBy.ITEMS and not job.stage(stage).after)
