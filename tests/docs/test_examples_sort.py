"""The sort example, against `LC_ALL=C sort`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.example_data import write_records
from tests.support.examples import EXAMPLES, contexts, handler, parts_of_bytes

sort_part = handler("sort", "sorting:sort_part")
merge = handler("sort", "sorting:merge")


def run(path: Path, folder: Path, size: int) -> tuple[int, bytes]:
    """Run the job without a grid, and return the number of lines and the sorted file."""
    ctx = contexts(folder / "tasks")
    parts = parts_of_bytes(path, folder / "parts", size)
    result = merge([sort_part(part, next(ctx)) for part in parts], next(ctx))
    return result["lines"], result["file"].read_bytes()


def by_sort(path: Path) -> bytes:
    return subprocess.run(["sort", path], env={"LC_ALL": "C"}, check=True, capture_output=True).stdout


@pytest.mark.parametrize("size", [1_000, 37_000, 10**9])
def test_order_is_that_of_sort_however_the_input_is_split(tmp_path: Path, size: int) -> None:
    facts = write_records(tmp_path, seed=1, size_bytes=300_000)
    assert run(facts.path, tmp_path, size) == (facts.lines, by_sort(facts.path))


@pytest.mark.parametrize(
    "text",
    [
        b"b\na\x01\na\na\tb\na b\n",
        b"no newline at the end\nof the file",
        b"\n\n\nblank lines\n\n",
        b"carriage\rreturn\nA\r\na\r\n",
        b"\xff\xfe\n\xc3\xa9\ne\nZ\n\x00\n",
    ],
)
def test_lines_that_are_often_sorted_wrongly(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "records.txt"
    path.write_bytes(text)
    count, found = run(path, tmp_path, size=6)
    assert found == by_sort(path)
    assert count == found.count(b"\n")


_MERGE = """
import sys, resource
from pathlib import Path
from types import SimpleNamespace
import sorting
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = [Path(name) for name in sys.argv[2:]]
files = [SimpleNamespace(open=lambda path=path: path.open("rb")) for path in parts]
ctx = SimpleNamespace(scratch=Path(sys.argv[1]), save=lambda path, name: str(path))
sorting.merge(files, ctx)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_merge_needs_far_less_memory_than_the_file_is_large(tmp_path: Path) -> None:
    facts = write_records(tmp_path, seed=2, size_bytes=24 * 2**20)
    ctx = contexts(tmp_path / "tasks")
    parts = parts_of_bytes(facts.path, tmp_path / "parts", 4 * 2**20)
    files = [str(sort_part(part, next(ctx)).path) for part in parts]
    grown_kib = subprocess.run(
        [sys.executable, "-c", _MERGE, tmp_path, *files],
        cwd=EXAMPLES / "sort",
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(grown_kib) < 8 * 1024
    assert (tmp_path / "sorted.txt").stat().st_size == facts.size_bytes
