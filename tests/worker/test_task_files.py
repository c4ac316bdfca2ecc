"""The files of a task: local inputs, stored outputs, and kept logs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from batchlab.adapters.local.objects import FilesInPlace, open_local
from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.errors import BackendError, Unreachable
from batchlab.core.model import FailureKind, Json
from batchlab.core.protocol import values
from batchlab.worker import code_cache, materialization
from batchlab.worker.inflight_message import Handle
from tests.support.worker.runner import Rig, collect, go, opened, until


async def put(rig: Rig, key: str, content: str, name: str = "") -> Json:
    await rig.objects.put(key, content.encode())
    return values.file_ref(key, name or key.rpartition("/")[2], len(content))


# --- Inputs --------------------------------------------------------------------------------------


def test_files_parts_and_large_values_arrive_at_any_depth(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            file = await put(rig, "raw/j/a.csv", "id,n\n1,2\n3,4\n")
            part = values.part_ref("raw/j/a.csv", 9, 13, name="a.csv", header=(0, 5))
            bare = values.part_ref("raw/j/a.csv", 5, 9, name="a.csv")
            large = {"inside": [file, {"$$k": 1}], "nested": values.value_ref("raw/j/v/2")}
            await rig.objects.put("raw/j/v/1", json.dumps(large).encode())
            await rig.objects.put("raw/j/v/2", b'["small", null]')
            items = [file, part, {"deep": [bare, file]}, values.value_ref("raw/j/v/1"), "plain"]
            whole = ["a.csv", 13, "id,n\n1,2\n3,4\n", "id,n\n"]
            assert await rig.values(items, handler="acts:read") == [
                whole,
                ["a.csv", 9, "id,n\n3,4\n", "id,n\n"],
                {"deep": [["a.csv", 4, "1,2\n", "1,2\n"], whole]},
                # "$k" in the result is a user's key, so its dollar sign is doubled.
                {"inside": [whole, {"$$k": 1}], "nested": ["small", None]},
                "plain",
            ]

    go(main())


def test_the_header_of_a_file_is_read_once_for_all_its_parts(tmp_path: Path) -> None:
    class Counting(SimObjects):
        def __init__(self) -> None:
            super().__init__()
            self.ranges: list[tuple[int, int]] = []

        async def get_range(self, key: str, start: int, stop: int) -> bytes:
            self.ranges.append((start, stop))
            return await super().get_range(key, start, stop)

    async def main() -> None:
        objects = Counting()
        async with opened(tmp_path, objects) as rig:
            await put(rig, "raw/j/a", "head\n" + "x\n" * 8)
            parts = [values.part_ref("raw/j/a", 5 + 4 * n, 9 + 4 * n, name="a", header=(0, 5)) for n in range(4)]
            got = await rig.values(parts, handler="acts:read")
            assert {text for _, _, text, _ in got} == {"head\nx\nx\n"}
            assert objects.ranges.count((0, 5)) == 1

    go(main())


def test_a_stored_file_is_used_in_place_where_it_lies_on_this_machine(tmp_path: Path) -> None:
    async def main() -> None:
        files = FilesInPlace(tmp_path / "bucket")
        async with opened(tmp_path, open_local(tmp_path / "bucket"), files=files) as rig:
            file = await put(rig, "raw/j/a.csv", "x")
            [path] = await rig.values([file], handler="acts:where")
            assert path == str(tmp_path / "bucket" / "raw" / "j" / "a.csv")
        async with opened(tmp_path) as rig:
            file = await put(rig, "raw/j/a.csv", "x", name="odd/../name.csv")
            [path] = await rig.values([file], handler="acts:where")
            assert path.startswith(str(rig.scratch.root))
            assert path.endswith("/name.csv")

    go(main())


def test_inputs_are_fetched_while_the_task_before_runs(tmp_path: Path) -> None:
    class Slow(SimObjects):
        async def download(self, key: str, path: Path) -> int:
            await asyncio.sleep(0.05)
            return await super().download(key, path)

    async def main() -> None:
        async with opened(tmp_path, Slow()) as rig:
            files = [await put(rig, f"raw/j/{n}", str(n)) for n in range(40)]
            began_s = rig.clock.monotonic_s()
            got = await rig.values(files, handler="acts:read")
            assert [text for _, _, text, _ in got] == [str(n) for n in range(40)]
            assert rig.clock.monotonic_s() - began_s < 40 * 0.05

    go(main())


def test_chunks_keep_the_order_and_grow() -> None:
    file = values.file_ref("k", "n", 10)
    items: list[Json] = [1, file, 2, file, file, 3, file, file, file, file, file]
    cut = list(materialization.chunks(range(11), items))
    assert [task for chunk in cut for task, _ in chunk] == list(range(11))
    assert [len(chunk) for chunk in cut] == [3, 3, 4, 1]
    huge = [values.part_ref("k", 0, 200 * 2**20, name="n")] * 3
    assert [len(chunk) for chunk in materialization.chunks(range(3), huge)] == [1, 1, 1]
    assert [len(chunk) for chunk in materialization.chunks(range(5), [None, 0, "", [], 1])] == [5]


@pytest.mark.parametrize("reference", ["$file", "$part", "$value", "short part"])
def test_a_vanished_input_fails_its_own_task_only(tmp_path: Path, reference: str) -> None:
    """A job must neither hang nor lose other tasks because of one missing input."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            await put(rig, "short", "abc")
            gone = {
                "$file": values.file_ref("raw/j/gone", "gone", 3),
                "$part": values.part_ref("raw/j/gone", 0, 3, name="gone"),
                "$value": values.value_ref("raw/j/gone"),
                "short part": values.part_ref("raw/j/short", 2, 9, name="gone"),
            }[reference]
            file = await put(rig, "raw/j/here", "here")
            got = await rig.run([file, {"deep": [gone]}, file], handler="acts:read")
            by_task = {ran.task: ran for ran in got}
            assert sorted(by_task) == [0, 1, 2]
            failure = by_task[1].failure
            assert failure is not None
            assert failure.kind is FailureKind.INPUT
            assert "Its input does not exist" in failure.reason
            assert by_task[0].value == by_task[2].value == ["here", 4, "here", "here"]

    go(main())


def test_large_value_that_is_not_json_is_an_input_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            await rig.objects.put("raw/j/v", b"not json")
            failure = await rig.failure(values.value_ref("raw/j/v"))
            assert failure.kind is FailureKind.INPUT
            assert "cannot be read" in failure.reason
            await rig.objects.put("raw/j/loop", json.dumps(values.value_ref("raw/j/loop")).encode())
            assert "deep" in (await rig.failure(values.value_ref("raw/j/loop"))).reason

    go(main())


class Full(SimObjects):
    """A bucket whose downloads fail with a full disk, with an adapter's error or with the bare OSError."""

    def __init__(self, *, bare: bool) -> None:
        super().__init__()
        self.bare = bare

    async def download(self, key: str, path: Path) -> int:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.bare:
            raise full
        raise BackendError(f"Object {key!r}") from full


@pytest.mark.parametrize("bare", [True, False])
def test_full_disk_is_a_failure_that_names_it(tmp_path: Path, bare: bool) -> None:
    async def main() -> None:
        async with opened(tmp_path, Full(bare=bare)) as rig:
            file = await put(rig, "raw/j/a", "a")
            ran = await rig.run([file, "fine"])
            failures = [one.failure for one in ran if one.failure]
            assert len(ran) == 2
            assert [failure.kind for failure in failures] == [FailureKind.INPUT]
            assert failures[0].reason == ("Its input does not fit on the worker: No space left on device")

    go(main())


NO_ROOM_FOR_CODE = "input: The job's code does not fit on the worker: No space left on device"


@pytest.mark.parametrize("bare", [True, False])
def test_no_room_for_a_pickled_function_fails_the_bundle(tmp_path: Path, bare: bool) -> None:
    """Before, an adapter's error returned the bundle to the queue, so that a worker with a full disk got it again."""

    async def main() -> None:
        async with opened(tmp_path, Full(bare=bare)) as rig:
            await rig.objects.put("jobs/j/fn", cloudpickle.dumps(abs))
            assert await rig.values([1, 2], handler="pickle:jobs/j/fn", folder=None) == [NO_ROOM_FOR_CODE] * 2

    go(main())


def test_no_room_for_a_code_zip_fails_the_bundle_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract, calls, failures = code_cache._extract, 0, 0

    def full(data: bytes, folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls <= failures:
            (folder / "part.py").write_text("x = 1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        extract(data, folder)

    async def main() -> None:
        nonlocal calls, failures
        async with opened(tmp_path) as rig:
            monkeypatch.setattr(code_cache, "_extract", full)
            failures = 2
            assert await rig.values(["fine"]) == [NO_ROOM_FOR_CODE]
            assert list(tmp_path.rglob("part.py")) == [], "a part of the code takes the room of the next bundle"
            # The second try of a bundle succeeds if the removal of unused files made room.
            calls, failures = 0, 1
            assert NO_ROOM_FOR_CODE not in await rig.values(["fine"])
            assert calls == 2

    go(main())


def test_no_room_for_the_runs_own_folder_fails_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> None:
        async with opened(tmp_path) as rig:
            work = await rig.work([1, 2])
            monkeypatch.setattr("batchlab.worker.execution._create_folder", full)
            ran = [one async for one in rig.runner.run(work, Handle())]
            reasons = [one.failure.reason for one in ran if one.failure]
            assert reasons == ["The worker's disk is full: No space left on device"] * 2

    go(main())


# --- Outputs -------------------------------------------------------------------------------------


def test_saved_files_are_stored_under_the_executions_own_prefix(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            items = [["save", "a.txt", "charts/b.png"], ["save", "a.txt"], ["save_silently"]]
            [[a, b], [other], nothing] = await rig.values(items)
            assert (a["name"], a["size"]) == ("a.txt", 5)
            assert a["$file"].startswith("files/j/s/")
            assert "/e-1/0/a.txt" in a["$file"]
            assert b["$file"].endswith("/e-1/0/charts/b.png")
            assert other["$file"].endswith("/e-1/1/a.txt")
            assert await rig.objects.get(b["$file"]) == b"charts/b.png"
            assert nothing is None
            kept = a["$file"].replace("/0/a.txt", "/2/kept.txt")
            assert await rig.objects.get(kept) == b"kept"

    go(main())


def test_objects_of_files_whose_names_differ_in_case_have_different_names(tmp_path: Path) -> None:
    """On `local`, the objects may be on a file system that ignores case."""

    async def main() -> None:
        async with opened(tmp_path) as rig:
            [saved] = await rig.values([["save", "A.txt", "a.txt"]])
            assert [ref["name"] for ref in saved] == ["A.txt", "a.txt"]
            assert [ref["$file"].partition("/e-1/")[2] for ref in saved] == ["0/A.txt", "0/2-a.txt"]
            assert [await rig.objects.get(ref["$file"]) for ref in saved] == [b"A.txt", b"a.txt"]

    go(main())


def test_a_value_of_more_than_32_kib_becomes_an_object(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            [ref] = await rig.values([["return", "big"]])
            assert sorted(ref) == ["$value", "sha256"]
            stored = json.loads(await rig.objects.get(ref["$value"]))
            assert stored == {"text": "x" * 40_000}
            [small] = await rig.values(["x" * 32_000])
            assert small == "x" * 32_000
            assert await rig.values([ref], handler="acts:same") != [stored], "stored again, not inline"

    go(main())


def test_an_input_that_is_returned_unchanged_is_not_stored_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            file = await put(rig, "raw/j/a.txt", "a")
            part = values.part_ref("raw/j/a.txt", 0, 1, name="a.txt", header=None)
            assert await rig.values([file, [part]], handler="acts:same") == [file, [part]]
            [changed] = await rig.values([file], handler="acts:change")
            assert changed["$file"] != "raw/j/a.txt"
            assert await rig.objects.get(changed["$file"]) == b"changed"
            assert await rig.objects.get("raw/j/a.txt") == b"a"

    go(main())


def test_file_rewritten_by_every_task_is_kept_for_each(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(tmp_path) as rig:
            refs = await rig.values([["write_here", str(n)] for n in range(20)])
            texts = [await rig.objects.get(ref["$file"]) for ref in refs]
            assert texts == [str(n).encode() for n in range(20)]

    go(main())


def test_files_of_the_same_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    async def main() -> None:
        for folder in ("x", "y"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "same.txt").write_text(folder)
        paths = [str(tmp_path / folder / "same.txt") for folder in ("x", "y")]
        async with opened(tmp_path) as rig:
            [[x, y, again]] = await rig.values([["foreign", *paths, paths[0]]])
            assert x == again
            assert [x["name"], y["name"]] == ["same.txt", "same.txt"]
            assert await rig.objects.get(x["$file"]) == b"x"
            assert await rig.objects.get(y["$file"]) == b"y"
        assert Path(paths[0]).exists()

    go(main())


def test_vanished_output_is_a_failure(tmp_path: Path) -> None:
    class Late(SimObjects):
        async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
            path.unlink(missing_ok=True)
            return await super().upload(key, path, if_absent=if_absent)

    async def main() -> None:
        async with opened(tmp_path, Late()) as rig:
            got = await rig.values([["save", "a"], "fine"])
            assert "result: Its output disappeared before it could be stored" in got[0]
            assert got[1] == "fine"

    go(main())


def test_a_store_that_fails_while_storing_gives_the_bundle_back(tmp_path: Path) -> None:
    class Down(SimObjects):
        async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
            raise Unreachable("nobody answers")

    async def main() -> None:
        async with opened(tmp_path, Down()) as rig:
            with pytest.raises(Unreachable):
                await rig.run([["save", "a"], ["sleep", 0.05]])
            assert await rig.runs_left() == []

    go(main())


def test_a_kill_does_not_wait_for_results_that_are_still_being_stored(tmp_path: Path) -> None:
    class Stuck(SimObjects):
        async def upload(self, key: str, path: Path, *, if_absent: bool = False) -> int:
            await asyncio.sleep(60)
            return 0

    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path, Stuck()) as rig:
            handle = Handle()
            work = await rig.work(["a", ["save", "b"], ["sleep", 60, str(mark)]])
            run = asyncio.create_task(collect(rig, work, handle))
            await until(mark.exists, "the last task's start")
            handle.kill = True
            await until(run.done, "the run's end", limit_s=5)
            assert [ran.value for ran in run.result()] == ["a"]

    go(main())


def test_a_tasks_folder_is_removed_as_soon_as_its_result_is_stored(tmp_path: Path) -> None:
    async def main() -> None:
        mark = tmp_path / "started"
        async with opened(tmp_path) as rig:
            file = await put(rig, "raw/j/a", "a")
            work = await rig.work([file, ["save", "x"], ["sleep", 60, str(mark)]])
            handle = Handle()
            run = asyncio.create_task(collect(rig, work, handle))
            await until(mark.exists, "the last task's start")
            folder = rig.scratch.execution(work.execution)
            await until(lambda: {p.name for p in folder.iterdir()} == {"cwd", "log"}, "the folders' end")
            handle.kill = True
            assert len(await run) == 2

    go(main())


def test_files_travel_in_any_object_of_the_python_api(tmp_path: Path) -> None:
    def first(item: Any, ctx: Any) -> Any:
        return {"path": ctx.save(b"content", "f.txt"), ("a", 1): {2}}

    def second(item: Any) -> Any:
        return [item["path"].read_text(), item["path"].name, item["a", 1] == {2}]

    async def main() -> None:
        async with opened(tmp_path) as rig:
            await rig.objects.put("first", cloudpickle.dumps(first))
            await rig.objects.put("second", cloudpickle.dumps(second))
            [made] = await rig.values([None], handler="pickle:first", folder=None)
            assert [ref["name"] for ref in values.references(made)] == ["f.txt"]
            [read] = await rig.values([made], handler="pickle:second", folder=None)
            assert values.decode(read, lambda _: None, pickles=True) == ["content", "f.txt", True]

    go(main())
