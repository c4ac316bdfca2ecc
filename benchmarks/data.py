"""Upload of raw input and download of results on the backend `local`.

Targets on a machine with two cores:
- A file of 1 GB is uploaded, split by lines or by bytes, and planned at 300 MB/s in constant memory. The benchmark also
  measures a plain copy of the file.
- 1,000,000 input files are listed and planned in under 60 s. The bucket has 1,000 folders of 1,000 files, and the job
  names either the folder or each file. Another measurement has one folder for each file, as after an upload.
- The results of 1,000,000 tasks are downloaded in under 60 s. The first measurement is `Grid.map` over tasks without
  work on two workers, including the execution of the tasks. The second measurement downloads the results of the same
  job in the same way as `batchlab fetch`.

    python benchmarks/data.py [--small] [--json FILE] [--only stream|listing|results]

The benchmark generates all data in a temporary folder (TMPDIR) and deletes the data at the end. A file is measured
three times and the best figure counts, because the first measurement uses memory that the machine must first provide.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from measured import Part, Row, peak_mb, rss_mb, run

from batchlab import Grid
from batchlab.adapters.local.objects import open_local
from batchlab.core.job_definition import InputDef, SplitBy
from batchlab.core.model import JobId, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.manager import input_split
from batchlab.manager.stage_plans import PartWriter

MB_PER_SECOND = 300
WITHIN_S = 60
ROUNDS = 3
MEMORY_MB = 100
"""Maximum memory growth in MB of a process that splits input.

The process holds one range of input and one part of the plan.
"""
SIZES = {SplitBy.LINES: 1000, SplitBy.BYTES: 1 << 20}
"""Number of lines or bytes of one task's input, by the way of splitting."""
JOB = JobId("bench-0123456789")


async def plan(objects: Objects, source: InputDef, stage: str) -> int:
    """Split and plan the input `source`. Return the number of planned tasks."""
    writer = PartWriter(objects, Patience(Random(1)), JOB, StageName(stage), 0)
    async for item in input_split.items(objects, source):
        await writer.add(item)
    return (await writer.commit(TaskSet())).count


# --- A large file --------------------------------------------------------------------------------


def stream(by: str, megabytes: int) -> list[Row]:
    """Measure the upload and the split of a file of `megabytes` MB."""
    source = SplitBy(by)
    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as name:
        folder = Path(name)
        size = write_records(folder / "input.csv", megabytes * 1_000_000)
        began_mb = rss_mb()
        rounds = [asyncio.run(one_round(folder, source, size)) for _ in range(ROUNDS)]
        copies = [copied(folder, size) for _ in range(ROUNDS)]
    uploaded, planned, both = (max(rates) for rates in zip(*rounds, strict=True))
    return [
        Row(f"{megabytes:,} MB by {by}: upload, split and plan", both, "MB/s", MB_PER_SECOND),
        Row("  upload alone", uploaded, "MB/s"),
        Row("  split and plan alone", planned, "MB/s"),
        Row("  a plain copy of the file (shutil.copyfile)", max(copies), "MB/s"),
        Row("  memory on top of the process's own", peak_mb() - began_mb, "MB", MEMORY_MB, True),
    ]


def write_records(path: Path, size: int) -> int:
    """Write a CSV file of at least `size` bytes with different records. Return the size of the file in bytes."""
    record = "%010d,some text of a record of about a hundred bytes,%012d,and the rest of it\n"
    block = "".join(record % (number, number * 7919) for number in range(10_000)).encode()
    written = 0
    with path.open("wb") as file:
        while written < size:
            written += file.write(block)
    return written


async def one_round(folder: Path, by: SplitBy, size: int) -> tuple[float, float, float]:
    """Return the MB per second of the upload, of the planning, and of the upload and the planning together."""
    objects = open_local(folder / "bucket")
    began_s = time.perf_counter()
    await objects.upload("raw/input.csv", folder / "input.csv")
    uploaded_s = time.perf_counter()
    await plan(objects, InputDef(("raw/input.csv",), by, SIZES[by], header=True), by)
    planned_s = time.perf_counter()
    shutil.rmtree(folder / "bucket")
    spans_s = (uploaded_s - began_s, planned_s - uploaded_s, planned_s - began_s)
    upload, split_, both = (size / 1e6 / span_s for span_s in spans_s)
    return upload, split_, both


def copied(folder: Path, size: int) -> float:
    began_s = time.perf_counter()
    shutil.copyfile(folder / "input.csv", folder / "copy")
    took_s = time.perf_counter() - began_s
    (folder / "copy").unlink()
    return size / 1e6 / took_s


# --- Many files ----------------------------------------------------------------------------------


def listing(folders: int, each: int) -> list[Row]:
    """Measure listing `folders` folders of `each` files and planning one task for each file."""
    count = folders * each
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as name:
        bucket = Path(name) / "bucket"
        for number in range(folders):
            make(bucket, number, each)
        for is_named in (False, True):
            keys = tuple(keys_of(folders, each)) if is_named else ("raw/",)
            began_mb = rss_mb()
            began_s = time.perf_counter()
            stage = "named" if is_named else "listed"
            assert asyncio.run(plan(open_local(bucket), InputDef(keys), stage)) == count
            took_s = time.perf_counter() - began_s
            how = "named one by one" if is_named else "named by their folder"
            # The time limit is proportional to the number of files.
            within_s = WITHIN_S * count / 1_000_000
            rows += [
                Row(f"{folders:,} × {each:,} files, {how}", took_s, "s", within_s, at_most=True),
                Row("  memory on top of the process's own", peak_mb() - began_mb, "MB"),
            ]
        began_s = time.perf_counter()
        assert sum(len(files) for _, _, files in os.walk(bucket / "raw")) == count
        rows.append(Row("  the same files found by os.walk", time.perf_counter() - began_s, "s"))
    return rows


def keys_of(folders: int, each: int) -> Iterator[str]:
    for number in range(folders):
        for one in range(each):
            yield f"raw/{number:07d}/{one:04d}.txt"


def make(bucket: Path, number: int, count: int) -> None:
    folder = bucket / "raw" / f"{number:07d}"
    folder.mkdir(parents=True)
    for one in range(count):
        (folder / f"{one:04d}.txt").touch()


# --- Many results --------------------------------------------------------------------------------


def no_op(item: int) -> int:
    return item


def results(count: int) -> list[Row]:
    """Measure `Grid.map` over `count` tasks without work, and then the download of the results into a folder."""
    with tempfile.TemporaryDirectory(prefix="batchlab-bench-") as name:
        folder = Path(name)
        with Grid("local", home=folder / "home", workers=2, warm=True) as grid:
            assert sum(grid.map(no_op, range(100))) == 4950
            began_mb = rss_mb()
            began_s = time.perf_counter()
            drawn = sum(1 for _ in grid.map(no_op, range(count)))
            mapped_s = time.perf_counter() - began_s
            assert drawn == count
            job = grid.wait(grid.client.jobs(limit=1)[0]["id"])
            began_s = time.perf_counter()
            fetched = job.fetch(folder / "out")
            fetched_s = time.perf_counter() - began_s
            assert fetched.results == {"map": count}
    within_s = WITHIN_S * count / 1_000_000
    return [
        Row(f"{count:,} results of Grid.map, run included", mapped_s, "s", within_s, at_most=True),
        Row(f"{count:,} results fetched into a folder", fetched_s, "s", within_s, at_most=True),
        Row("  memory of the client on top of its own", peak_mb() - began_mb, "MB"),
    ]


def choose(small: bool) -> list[tuple[str, list[Any]]]:
    """Return the parts of the benchmark to run, with the arguments of each part."""
    if small:
        return [
            *(("stream", [by.value, 100]) for by in SIZES),
            ("listing", [10, 1000]),
            ("listing", [1000, 1]),
            ("results", [20_000]),
        ]
    return [
        *(("stream", [by.value, 1000]) for by in SIZES),
        ("listing", [1000, 1000]),
        ("listing", [20_000, 1]),
        ("results", [1_000_000]),
    ]


if __name__ == "__main__":
    parts: Mapping[str, Part] = {"stream": stream, "listing": listing, "results": results}
    run(__doc__, parts, choose)
