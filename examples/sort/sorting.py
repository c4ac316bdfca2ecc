"""Sorting a text file that is larger than a worker's memory: sort the parts, then merge them.

The order is that of `LC_ALL=C sort`: lines compare by their bytes, newlines do not count.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchlab import Context, File


def sort_part(item: File, ctx: Context) -> File:
    """One part of the input, sorted in memory."""
    path = ctx.scratch / "part.txt"
    with item.open() as source, path.open("wb") as target:
        target.writelines(line + b"\n" for line in sorted(lines(source)))
    return ctx.save(path, path.name)


def merge(item: list[File], ctx: Context) -> dict[str, Any]:
    """All sorted parts as one file. Holds one line of each in memory, however long they are."""
    path = ctx.scratch / "sorted.txt"
    count = 0
    with ExitStack() as stack, path.open("wb") as target:
        sources = [stack.enter_context(part.open()) for part in item]
        for line in heapq.merge(*map(lines, sources)):
            target.write(line + b"\n")
            count += 1
    return {"lines": count, "file": ctx.save(path, path.name)}


def lines(source: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline, which would sort before a tab or another low byte."""
    return (line.removesuffix(b"\n") for line in source)
