"""The way from raw files to the input of each task. Every byte is in exactly one task and in order, for any content.

The planner, the plan, and the worker are real. Only the bucket is in memory.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from batchlab.adapters.memory.objects import SimObjects
from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import Bundle, Failure, JobId, Json, StageName, TaskSet
from batchlab.core.port_retries import Patience
from batchlab.core.protocol import values
from batchlab.core.protocol.bundle_inputs import Inputs, JobObjects
from batchlab.core.protocol.object_keys import UNSEALED
from batchlab.manager import input_split, stage_plans
from batchlab.worker import materialization
from tests.support.properties import SLOW

JOB, STAGE = JobId("j-0123456789"), StageName("one")
PATIENCE = Patience(random.Random(0))

NEWLINES = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b""])


def joined(pieces: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Join pieces with one kind of line break, with or without a last line break."""
    return st.builds(
        lambda parts, newline, ended: newline.join(parts) + (newline if ended else b""),
        st.lists(pieces, max_size=12),
        NEWLINES,
        st.booleans(),
    )


FIELD = st.one_of(
    st.from_regex(rb"[a-z0-9 ]{0,8}", fullmatch=True),
    # A quoted field of CSV may contain field and record separators.
    st.from_regex(rb'"[a-z,;\n\r|]{0,8}("")?[a-z\n]{0,3}"', fullmatch=True),
)
CSV = joined(st.lists(FIELD, min_size=1, max_size=4).map(b",".join))
X12 = joined(st.from_regex(rb"(ISA|CLM|SV1|SE)(\*[A-Z0-9:.]{0,6}){1,4}~?", fullmatch=True))
LINES = joined(st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")))
BYTES = st.binary(max_size=200)
CONTENT = st.one_of(BYTES, LINES, CSV, X12)
FILES = st.lists(CONTENT, min_size=1, max_size=4)


def read(files: Sequence[bytes], by: SplitBy, size: int, header: bool = False) -> list[list[Any]]:
    """Return the input of the tasks of each file in order: the bytes of a file or part, or the item."""
    objects = SimObjects()

    async def main() -> list[tuple[str, Any]]:
        keys = [f"raw/{JOB}/{i:07d}/data.txt" for i in range(len(files))]
        for key, content in zip(keys, files, strict=True):
            await objects.put(key, content)
        given = InputDef(tuple(keys), by, size, header)
        writer = stage_plans.PartWriter(objects, PATIENCE, JOB, STAGE, 0)
        async for item in input_split.items(objects, given):
            await writer.add(item)
        manifest = await writer.commit(TaskSet())
        job = JobDef(JOB, "j", (StageDef(STAGE, handler="m:f"),), 0.0, given)
        bundle = Bundle(JOB, STAGE, TaskSet.span(0, manifest.count))
        inputs = Inputs(objects, PATIENCE)
        items = await inputs.resolve(job, bundle, UNSEALED) if manifest.count else []
        with tempfile.TemporaryDirectory() as folder:
            return await _local(objects, list(items), Path(folder))

    found: list[list[Any]] = [[] for _ in files]
    for key, content in asyncio.run(main()):
        found[int(key.split("/")[2])].append(content)
    return found


async def _local(objects: SimObjects, items: list[Json], folder: Path) -> list[tuple[str, Any]]:
    """Return (key, content) of each task's local input. An item has the key of the first file."""
    inputs = materialization.Inputs(objects, folder, asyncio.to_thread, JobObjects(JOB, is_python=False))
    found: list[tuple[str, Any]] = []
    for (_, local), item in zip(await inputs.fetch(enumerate(items)), items, strict=True):
        assert not isinstance(local, Failure), local
        kind = values.kind(item)
        if kind in ("$file", "$part"):
            found.append((item[kind], Path(local["$file"]).read_bytes()))
        else:
            found.append((f"raw/{JOB}/0000000/", values.decode(local, _no_file, pickles=True)))
    return found


def _no_file(reference: Json) -> Any:
    raise AssertionError(f"{reference} is no file")


@SLOW
@given(FILES)
def test_files(files: list[bytes]) -> None:
    assert read(files, SplitBy.FILE, 1) == [[content] for content in files]


@SLOW
@given(FILES, st.integers(1, 12))
def test_lines(files: list[bytes], size: int) -> None:
    for content, parts in zip(files, read(files, SplitBy.LINES, size), strict=True):
        assert b"".join(parts) == content
        assert all(part.endswith(b"\n") for part in parts[:-1]), "a line is cut"
        assert all(part.count(b"\n") == size for part in parts[:-1])


@SLOW
@given(FILES, st.integers(1, 80))
def test_bytes(files: list[bytes], size: int) -> None:
    for content, parts in zip(files, read(files, SplitBy.BYTES, size), strict=True):
        assert b"".join(parts) == content
        assert all(part.endswith(b"\n") for part in parts[:-1]), "a line is cut"
        assert all(len(part) <= size or b"\n" not in part[:-1] for part in parts)


@SLOW
@given(FILES, st.integers(1, 80), st.sampled_from([SplitBy.LINES, SplitBy.BYTES]))
def test_a_header_is_in_every_part_and_all_else_in_one(files: list[bytes], size: int, by: SplitBy) -> None:
    for content, parts in zip(files, read(files, by, size, header=True), strict=True):
        first, newline, rest = content.partition(b"\n")
        header = first + newline
        assert all(part.startswith(header) for part in parts)
        assert b"".join(part.removeprefix(header) for part in parts) == rest


ITEMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Some items are long enough for a separate object.
    | st.text(st.characters(codec="utf-8"))
    | st.integers(99_990, 100_010).map(lambda size: "x" * size),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "", "$file", "$value", "$gather", "$$"]), inner)
    ),
    max_leaves=4,
)


@SLOW
@given(st.lists(ITEMS, max_size=12), st.integers(1, 5), NEWLINES.filter(lambda n: b"\n" in n))
def test_items(items: list[Any], size: int, newline: bytes) -> None:
    content = newline.join(json.dumps(item, ensure_ascii=False).encode() for item in items)
    (found,) = read([content], SplitBy.ITEMS, size)
    if size > 1:
        assert all(len(group) == size for group in found[:-1])
        found = [one for group in found for one in group]
    assert json.dumps(found) == json.dumps(items)
