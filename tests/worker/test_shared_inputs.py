"""Shared values of tasks, which a worker without local objects downloads once per instance."""

from __future__ import annotations

import asyncio
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
    key = object_keys.pickled(data)
    item = {"$pickle": "", "files": [values.file_ref(key, "value.pkl", 300 * 1024 * 1024)]}
    objects = Counting()

    async def fetch() -> None:
        await objects.put(key, data)
        cache = CodeCache(objects, Scratch(tmp_path), asyncio.to_thread)
        own = JobObjects(JobId("job-1"), is_python=True)
        paths = set()
        for execution in ("a", "b"):
            inputs = materialization.Inputs(objects, tmp_path / execution, asyncio.to_thread, own, shared=cache.pickled)
            for _, ready in await inputs.fetch([(0, item), (1, item)]):
                assert not isinstance(ready, Failure)
                paths.add(ready["files"][0]["$file"])
        assert [Path(path).read_bytes() for path in paths] == [data]
        inputs = materialization.Inputs(objects, tmp_path, asyncio.to_thread, own, shared=cache.pickled)
        missing = {"$file": object_keys.pickled(b"missing"), "name": "x", "size": 1}
        [(_, failure)] = await inputs.fetch([(0, missing)])
        assert isinstance(failure, Failure)
        assert "does not exist" in failure.reason

    asyncio.run(fetch())
    assert objects.downloads == 2


def test_the_size_of_a_shared_value_does_not_limit_a_chunk() -> None:
    item = {"$file": object_keys.pickled(b"x"), "name": "x", "size": 300 * 1024 * 1024}
    chunks = list(materialization.chunks(range(20), [item] * 20))
    assert [len(chunk) for chunk in chunks] == [1, 2, 4, 8, 5]
