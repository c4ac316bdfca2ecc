"""Handlers that sort a text file larger than a worker's memory: one sorts the parts, and one merges the sorted parts.

The lines are sorted as by `LC_ALL=C sort`: by their bytes, without the newline.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab import Context, File


def sort_part(item: File, ctx: Context) -> File:
    """Sort one part of the input in memory, and return the sorted part."""
    path = ctx.scratch / "part.txt"
    with item.open() as source, path.open("wb") as target:
        target.writelines(line + b"\n" for line in sorted(lines(source)))
    return ctx.save(path, path.name)


def merge(item: list[File], ctx: Context) -> dict[str, Any]:
    """Merge all sorted parts into one file. Memory holds only one line of each part, however large the parts are."""
    path = ctx.scratch / "sorted.txt"
    count = 0
    with ExitStack() as stack, path.open("wb") as target:
        sources = [stack.enter_context(part.open()) for part in item]
        for line in heapq.merge(*map(lines, sources)):
            target.write(line + b"\n")
            count += 1
    return {"lines": count, "file": ctx.save(path, path.name)}


def lines(source: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines without newlines. With newlines, a tab or a lower byte would sort before the end of a line."""
    return (line.removesuffix(b"\n") for line in source)
