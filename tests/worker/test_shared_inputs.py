"""Shared values of tasks, which a worker without local objects downloads once per instance."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import pickle
from pathlib import Path

import pytest

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.model import Failure, JobId
from batchlab.core.protocol import object_keys, values
from batchlab.core.protocol.bundle_inputs import JobObjects
from batchlab.worker import code_cache, materialization
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
            inputs = materialization.Inputs(objects, tmp_path / execution, asyncio.to_thread, own, cache=cache)
            for _, ready in await inputs.fetch([(0, item), (1, item)]):
                assert not isinstance(ready, Failure)
                paths.add(ready["files"][0]["$file"])
        assert [Path(path).read_bytes() for path in paths] == [data, data]
        inputs = materialization.Inputs(objects, tmp_path, asyncio.to_thread, own, cache=cache)
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
            link = tmp_path / "run" / str(number)
            await cache.link_value(keys[n], link)
            assert link.read_text() == keys[n]
            link.unlink()

    asyncio.run(fetch())
    assert objects.downloads == 4
    assert len(list((tmp_path / "values").iterdir())) == 2


def test_functions_that_were_used_least_recently_are_removed_from_the_disk(tmp_path: Path) -> None:
    objects = Counting()
    keys = [object_keys.pickled(bytes([n])) for n in range(20)]

    async def fetch() -> None:
        cache = CodeCache(objects, Scratch(tmp_path), asyncio.to_thread, 2000)
        for number, key in enumerate(keys):
            await objects.put(key, bytes(900))
            folder = tmp_path / "run" / str(number)
            await cache.function(key, folder)
            if number:  # The first execution continues to run.
                cache.release_function(folder)
        functions = [cache.cached_function(key, tmp_path / "run" / f"again-{n}") for n, key in enumerate(keys)]
        assert [bool(path) for path in functions] == [True] + [False] * 18 + [True]
        assert all(path is None or path.is_file() for path in functions)

    asyncio.run(fetch())
    assert len(list((tmp_path / "functions").iterdir())) == 2


def test_number_of_functions_on_the_disk_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "MAX_CACHED_FILES", 3)

    async def fetch() -> None:
        objects, folder = SimObjects(), tmp_path / "run"
        cache = CodeCache(objects, Scratch(tmp_path), asyncio.to_thread)
        for n in range(20):
            key = object_keys.pickled(bytes([n]))
            await objects.put(key, b"x")
            await cache.function(key, folder)
            cache.release_function(folder)

    asyncio.run(fetch())
    assert len(list((tmp_path / "functions").iterdir())) == 3


class SmallDisk(SimObjects):
    """Objects that are downloaded to a disk of 1000 bytes."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    async def download(self, key: str, path: Path) -> int:
        used = {file.stat().st_ino: file.stat().st_size for file in self._root.rglob("*") if file.is_file()}
        if sum(used.values()) + len(await self.get(key)) > 1000:
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        return await super().download(key, path)


def test_unused_values_make_room_for_inputs(tmp_path: Path) -> None:
    objects = SmallDisk(tmp_path)
    unused, used = (object_keys.shared_value("values-1", f"{n:064x}") for n in range(2))
    job = JobObjects(JobId("job-1"), is_python=True)
    inputs = [f"{object_keys.raw(JobId('job-1'))}{n}" for n in range(2)]

    async def fetch() -> None:
        for key in (unused, used, *inputs):
            await objects.put(key, bytes(400))
        cache = CodeCache(objects, Scratch(tmp_path), asyncio.to_thread)
        await cache.link_value(unused, tmp_path / "run" / "ended")
        (tmp_path / "run" / "ended").unlink()
        await cache.link_value(used, tmp_path / "run" / "running")
        fetcher = materialization.Inputs(objects, tmp_path / "run" / "new", asyncio.to_thread, job, cache=cache)
        [(_, first)] = await fetcher.fetch([(0, values.file_ref(inputs[0], "x", 400))])
        assert not isinstance(first, Failure)
        assert Path(first["$file"]).read_bytes() == bytes(400)
        [(_, second)] = await fetcher.fetch([(1, values.file_ref(inputs[1], "x", 400))])
        assert isinstance(second, Failure)
        assert "does not fit on the worker" in second.reason

    asyncio.run(fetch())
    assert (tmp_path / "run" / "running").stat().st_nlink == 2


def test_the_size_of_a_shared_value_does_not_limit_a_chunk() -> None:
    item = {"$file": object_keys.shared_value("values-1", "a" * 64), "name": "x", "size": 300 * 1024 * 1024}
    chunks = list(materialization.chunks(range(20), [item] * 20))
    assert [len(chunk) for chunk in chunks] == [1, 2, 4, 8, 5]
