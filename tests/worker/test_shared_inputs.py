"""Shared values of tasks, which a worker without local objects downloads once per instance."""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from pathlib import Path

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.model import Failure, JobId
from batchlab.core.protocol import object_keys, values
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.worker import materialization
from batchlab.worker.code_cache import CodeCache
from batchlab.worker.inflight_message import Scratch


class Counting(SimObjects):
    """Objects that count their downloads."""

    def __init__(self) -> None:
        super().__init__()
        self.downloads = 0

    async def download(self, key: str, path: Path) -> int:
        self.downloads += 1
        return await super().download(key, path)


def test_shared_value_is_downloaded_once_for_all_tasks(tmp_path: Path) -> None:
    data = pickle.dumps([1, 2])
    key = object_keys.shared_value("values-1", hashlib.sha256(data).hexdigest())
    item = {"$pickle": "", "files": [values.file_ref(key, "value.pkl", 300 * 1024 * 1024)]}
    objects = Counting()

    async def fetch() -> None:
        await objects.put(key, data)
        cache = CodeCache(objects, Scratch(tmp_path), asyncio.to_thread)
        own = JobObjects(JobId("job-1"), is_python=True)
        paths = set()
        for execution in ("a", "b"):
            inputs = materialization.Inputs(
                objects, tmp_path / execution, asyncio.to_thread, own, link_value=cache.value
            )
            for _, ready in await inputs.fetch([(0, item), (1, item)]):
                assert not isinstance(ready, Failure)
                paths.add(ready["files"][0]["$file"])
        assert [Path(path).read_bytes() for path in paths] == [data, data]
        inputs = materialization.Inputs(objects, tmp_path, asyncio.to_thread, own, link_value=cache.value)
        missing = {"$file": object_keys.shared_value("values-1", "a" * 64), "name": "x", "size": 1}
        [(_, failure)] = await inputs.fetch([(0, missing)])
        assert isinstance(failure, Failure)
        assert "does not exist" in failure.reason

    asyncio.run(fetch())
    assert objects.downloads == 2


def test_values_that_were_used_least_recently_are_removed_from_the_disk(tmp_path: Path) -> None:
    objects = Counting()
    keys = [object_keys.shared_value("values-1", f"{n:064x}") for n in range(3)]

    async def fetch() -> None:
        for key in keys:
            await objects.put(key, key.encode())
        cache = CodeCache(objects, Scratch(tmp_path), asyncio.to_thread, 2 * len(keys[0]))
        for number, n in enumerate((0, 1, 0, 2, 0, 1)):
            await cache.value(keys[n], tmp_path / "run" / str(number))

    asyncio.run(fetch())
    assert objects.downloads == 4
    assert len(list((tmp_path / "values").iterdir())) == 2
    # A link of an execution keeps its content.
    assert [path.read_text() for path in sorted((tmp_path / "run").iterdir())] == [keys[n] for n in (0, 1, 0, 2, 0, 1)]


def test_the_size_of_a_shared_value_does_not_limit_a_chunk() -> None:
    item = {"$file": object_keys.shared_value("values-1", "a" * 64), "name": "x", "size": 300 * 1024 * 1024}
    chunks = list(materialization.chunks(range(20), [item] * 20))
    assert [len(chunk) for chunk in chunks] == [1, 2, 4, 8, 5]
