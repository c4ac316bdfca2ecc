"""Downloaded results, which are in one folder, in task order, and with their files."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchlab.adapters.local.objects import open_local
from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.api_types import JobView
from batchlab.core.errors import UsageError
from batchlab.core.job_definition import JobDef, StageDef
from batchlab.core.model import Bundle, Failure, FailureKind, JobId, Json, Outcome, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.core.protocol import json_format, object_keys, values
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.jobs.results import OUTCOMES_AT_ONCE, Fetched, Listed, fetch, final_stages, in_task_order
from batchlab.runtime.home import Home
from batchlab.worker import code_cache

JOB = JobId("sums-0123456789")
PATIENCE = Patience(random.Random(1))
PARSE, TOTAL = StageName("parse"), StageName("total")


def job(*stages: StageDef) -> JobDef:
    return JobDef(JOB, "sums", stages or (StageDef(PARSE, handler="m:f"),), 0.0)


def view(round_: int = 0) -> JobView:
    return {
        "id": JOB,
        "name": "sums",
        "owner": "owner",
        "state": "SUCCEEDED",
        "reason": "",
        "round": round_,
        "priority": 0,
        "share": "",
        "tags": {},
        "after": [],
        "submitted_s": 0.0,
        "started_s": 0.0,
        "ended_s": 1.0,
        "version": 0,
        "report": "",
        "stages": [],
    }


class Bucket:
    """A bucket with a job, and the listing that a manager would return."""

    def __init__(self, objects: Objects, definition: JobDef) -> None:
        self.objects = objects
        self.listing: list[Listed] = []
        self._put(object_keys.spec(JOB), json_format.job_to_json(definition))

    def _put(self, key: str, doc: Json) -> None:
        asyncio.run(self.objects.put(key, json_format.to_bytes(doc)))

    def put(self, key: str, data: bytes) -> str:
        asyncio.run(self.objects.put(key, data))
        return key

    def outcome(
        self,
        tasks: Sequence[int],
        found: dict[int, Json],
        *,
        stage: StageName = PARSE,
        attempt: int = 1,
        round_: int = 0,
    ) -> None:
        """Commit a bundle's outcome with the results in `found` and failures of the other tasks."""
        bundle = Bundle(JOB, stage, TaskSet.from_indices(tasks), attempt, round_)
        outcome = Outcome(
            bundle,
            "e1",
            "w1",
            0.0,
            1.0,
            TaskSet.from_indices(found),
            tuple(found[task] for task in sorted(found)),
            tuple(0.1 for _ in found),
            tuple(Failure(t, FailureKind.EXIT, "no") for t in tasks if t not in found),
        )
        self._put(object_keys.outcome(bundle, UNSEALED), json_format.outcome_to_json(outcome))
        self.listing.append(Listed(stage, object_keys.outcome(bundle, UNSEALED), outcome.succeeded))

    def fetch(self, out: Path, round_: int = 0, stages: Sequence[str] = ()) -> Fetched:
        return asyncio.run(fetch(self.objects, view(round_), self.listing, out, patience=PATIENCE, stages=stages))


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(open_local(tmp_path / "bucket"), job())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tree(folder: Path) -> set[str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != object_keys.MADE)
    return {path.relative_to(folder).as_posix() for path in files}


def test_lines_are_in_task_order_after_retries(bucket: Bucket, tmp_path: Path) -> None:
    bucket.outcome([8, 9], {8: "i", 9: "j"})
    bucket.outcome([2, 5], {2: "c", 5: "f"}, attempt=2)
    bucket.outcome(range(8), {t: "abcdefgh"[t] for t in (0, 1, 3, 4, 6, 7)})
    fetched = bucket.fetch(tmp_path / "out")
    assert lines(tmp_path / "out/parse.jsonl") == [
        {"task": task, "value": letter} for task, letter in enumerate("abcdefghij")
    ]
    assert fetched.results == {"parse": 10}


def test_failed_tasks_leave_no_line(bucket: Bucket, tmp_path: Path) -> None:
    """A failed task must not hide the results of other tasks."""
    bucket.outcome([0, 1, 2], {0: 1, 2: 3})
    bucket.outcome([3], {})
    bucket.fetch(tmp_path / "out")
    assert [line["task"] for line in lines(tmp_path / "out/parse.jsonl")] == [0, 2]


def test_only_final_stages_are_downloaded_by_default(tmp_path: Path) -> None:
    whole = job(StageDef(PARSE, handler="m:f"), StageDef(TOTAL, after=(PARSE,), gather="*", handler="m:g"))
    assert final_stages(whole) == ["total"]
    bucket = Bucket(open_local(tmp_path / "bucket"), whole)
    bucket.outcome([0], {0: "part"})
    bucket.outcome([0], {0: "sum"}, stage=TOTAL)
    bucket.fetch(tmp_path / "out")
    assert tree(tmp_path / "out") == {"total.jsonl", "summary.json"}
    bucket.fetch(tmp_path / "named", stages=["parse"])
    assert lines(tmp_path / "named/parse.jsonl") == [{"task": 0, "value": "part"}]
    with pytest.raises(UsageError, match=r"does not have a stage 'pasre'.*It has parse, total"):
        bucket.fetch(tmp_path / "out", stages=["pasre"])


def test_files_are_fetched_and_values_name_them(bucket: Bucket, tmp_path: Path) -> None:
    one = values.file_ref(bucket.put(f"files/{JOB}/1", b"one"), "chart.png", 3)
    deep = values.file_ref(bucket.put(f"files/{JOB}/2", b"deep"), "parts/a.csv", 4)
    bucket.outcome([7], {7: {"chart": one, "parts": [deep, 5]}})
    fetched = bucket.fetch(tmp_path / "out")
    value = lines(tmp_path / "out/parse.jsonl")[0]["value"]
    assert value == {"chart": "files/parse/7/chart.png", "parts": ["files/parse/7/parts/a.csv", 5]}
    assert (tmp_path / "out" / value["chart"]).read_bytes() == b"one"
    assert (tmp_path / "out" / value["parts"][0]).read_bytes() == b"deep"
    assert (fetched.files, fetched.size_bytes) == (2, 7)
    (outcome,) = (tmp_path / "bucket").rglob("outcomes/*/*.json")
    assert fetched.read_bytes == outcome.stat().st_size + 7, "what has left the bucket"


def test_files_that_are_fetched_at_once_are_all_counted(bucket: Bucket, tmp_path: Path) -> None:
    refs = {
        task: values.file_ref(bucket.put(f"files/{JOB}/{task}", b"x" * (70_000 + task)), "x", 70_000 + task)
        for task in range(20)
    }
    bucket.outcome(range(20), refs)
    fetched = bucket.fetch(tmp_path / "out")
    assert (fetched.files, fetched.size_bytes) == (20, 20 * 70_000 + sum(range(20)))


def test_a_part_of_an_object_becomes_a_file_with_its_header(bucket: Bucket, tmp_path: Path) -> None:
    key = bucket.put(f"raw/{JOB}/a.csv", b"name\none\ntwo\nthree\n")
    bucket.outcome([0], {0: values.part_ref(key, 9, 13, name="a.csv", header=(0, 5))})
    bucket.fetch(tmp_path / "out")
    assert (tmp_path / "out/files/parse/0/a.csv").read_bytes() == b"name\ntwo\n"


def test_large_values_are_put_in_place_however_deep(bucket: Bucket, tmp_path: Path) -> None:
    file = values.file_ref(bucket.put(f"files/{JOB}/1", b"x"), "x.bin", 1)
    inner = bucket.put(f"files/{JOB}/v/2", json.dumps({"numbers": [1, 2], "file": file}).encode())
    outer = bucket.put(f"files/{JOB}/v/1", json.dumps([values.value_ref(inner)]).encode())
    bucket.outcome([0], {0: values.value_ref(outer)})
    bucket.fetch(tmp_path / "out")
    assert lines(tmp_path / "out/parse.jsonl")[0]["value"] == [{"numbers": [1, 2], "file": "files/parse/0/x.bin"}]


def test_dollar_keys_of_users_round_trip(bucket: Bucket, tmp_path: Path) -> None:
    mine = {"$file": "not a reference", "$$": 1}
    bucket.outcome([0], {0: values.encode(mine)})
    bucket.fetch(tmp_path / "out")
    assert lines(tmp_path / "out/parse.jsonl")[0]["value"] == mine


def test_pickled_objects_are_left_alone(bucket: Bucket, tmp_path: Path) -> None:
    """Unpickling a value would run code that the writer of the outcome has chosen."""
    pickled = values.encode_object({1, 2})
    bucket.outcome([0], {0: pickled})
    bucket.fetch(tmp_path / "out")
    assert lines(tmp_path / "out/parse.jsonl")[0]["value"] == pickled


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "a/../../evil", "..\\evil", "", ".", "..", "a\0b", "x" * 5000]
)
def test_no_name_leads_out_of_the_folder(bucket: Bucket, tmp_path: Path, name: str) -> None:
    bucket.outcome([0], {0: values.file_ref(bucket.put(f"files/{JOB}/1", b"data"), name, 4)})
    before = tree(tmp_path / "bucket")
    bucket.fetch(tmp_path / "out")
    value = lines(tmp_path / "out/parse.jsonl")[0]["value"]
    path = (tmp_path / "out" / value).resolve()
    assert path.is_relative_to(tmp_path / "out/files/parse/0")
    assert path.read_bytes() == b"data"
    assert tree(tmp_path) - {f"out/{n}" for n in tree(tmp_path / "out")} == {f"bucket/{n}" for n in before}


def test_files_of_one_task_never_replace_each_other(bucket: Bucket, tmp_path: Path) -> None:
    names = ["part.csv", "part.csv", "PART.csv", "a", "a/b", "b/c", "b"]
    refs = [values.file_ref(bucket.put(f"files/{JOB}/{i}", str(i).encode()), name, 1) for i, name in enumerate(names)]
    bucket.outcome([0], {0: [*refs, refs[0]]})
    fetched = bucket.fetch(tmp_path / "out")
    paths = lines(tmp_path / "out/parse.jsonl")[0]["value"]
    assert paths[0] == paths[-1] == "files/parse/0/part.csv"
    found = [(tmp_path / "out" / path).read_text() for path in paths[:-1]]
    assert found == [str(i) for i in range(len(names))]
    assert len({path.casefold() for path in paths[:-1]}) == fetched.files == len(names)


def test_fetching_again_leaves_no_file_of_before(bucket: Bucket, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for task in range(3):
        ref = values.file_ref(bucket.put(f"files/{JOB}/{task}", b"x"), "x", 1)
        bucket.outcome([task], {task: ref})
    bucket.fetch(out)
    (out / "notes.txt").write_text("mine")
    del bucket.listing[1:]
    bucket.fetch(out)
    expected = {"parse.jsonl", "summary.json", "files/parse/0/x", "notes.txt"}
    assert tree(out) == expected


def test_foreign_folder_keeps_its_files(bucket: Bucket, tmp_path: Path) -> None:
    mine = tmp_path / "out/files/parse/9/mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "out/summary.json").write_text("[1]")
    bucket.outcome([0], {0: 1})
    bucket.fetch(tmp_path / "out")
    assert mine.read_text() == "mine"


def test_results_are_never_executed(bucket: Bucket, tmp_path: Path) -> None:
    """Downloaded results are not part of a job's code. Otherwise, the second run of a job would be a different job,
    because the folder `out` is next to its code."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "handlers.py").write_text("x = 1")
    before = code_cache.pack(folder)
    bucket.outcome([0], {0: 1})
    bucket.fetch(folder / "out/sums")
    Home(folder / "my-grid").make()
    assert code_cache.pack(folder) == before
    # A folder with the user's files is code, even if results are downloaded into it.
    (folder / "lib").mkdir()
    (folder / "lib/tools.py").write_text("y = 1")
    bucket.fetch(folder / "lib")
    assert code_cache.pack(folder) != before


def test_failed_download_keeps_the_earlier_results(bucket: Bucket, tmp_path: Path) -> None:
    bucket.outcome([0], {0: "first"})
    bucket.fetch(tmp_path / "out")
    before = (tmp_path / "out/parse.jsonl").read_text()
    bucket.outcome([1], {1: values.value_ref(f"files/{JOB}/v/gone")})
    with pytest.raises(Exception, match=f"files/{JOB}/v/gone"):
        bucket.fetch(tmp_path / "out")
    assert (tmp_path / "out/parse.jsonl").read_text() == before
    assert not [name for name in tree(tmp_path / "out") if name.endswith(".part")]


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    bucket.outcome([0], {0: 1})
    with pytest.raises(UsageError, match=r"cannot be written.*--out"):
        bucket.fetch(tmp_path / "out")


class Counting(SimObjects):
    """A bucket that counts concurrent reads."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    async def get(self, key: str, *, limit: int | None = None) -> bytes:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.002)
        self.now -= 1
        return await super().get(key, limit=limit)


def test_outcomes_are_read_concurrently_with_a_bound(tmp_path: Path) -> None:
    """The number of outcomes that are read ahead is limited, so that memory does not grow with the job."""
    objects = Counting()
    bucket = Bucket(objects, job())
    for task in range(40):
        bucket.outcome([task], {task: task})
    read = 0

    def note(size_bytes: int) -> None:
        nonlocal read
        assert size_bytes > 0
        read += 1

    async def slow_reader() -> list[int]:
        found: list[int] = []
        async for task, value in in_task_order(objects, bucket.listing, PATIENCE, note):
            assert task == value == len(found)
            assert read <= task + 1
            found.append(task)
        return found

    assert asyncio.run(slow_reader()) == list(range(40))
    assert 1 < objects.most <= OUTCOMES_AT_ONCE


def test_progress_counts_every_outcome(bucket: Bucket, tmp_path: Path) -> None:
    for task in range(5):
        bucket.outcome([task], {task: task})
    heard: list[tuple[int, int]] = []
    asyncio.run(
        fetch(
            bucket.objects,
            view(),
            bucket.listing,
            tmp_path / "out",
            patience=PATIENCE,
            progress=lambda done, of: heard.append((done, of)),
        )
    )
    assert heard == [(done, 5) for done in range(1, 6)]
