"""Independent computations of the examples' results.

The module also has what a handler needs without a grid: contexts, and functions that split input.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from batchlab.core.task_context import Context, File
from tests.support import ROOT

EXAMPLES = ROOT / "examples"


def handler(example: str, name: str) -> Callable[..., Any]:
    """Return the function `module:function` of an example, with the example's folder as the code folder."""
    module, _, function = name.partition(":")
    folder = EXAMPLES / example
    own = {path.stem for path in folder.glob("*.py")}
    for other in own:
        sys.modules.pop(other, None)
    sys.path.insert(0, str(folder))
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    finally:
        sys.path.remove(str(folder))
        for other in own:
            sys.modules.pop(other, None)
    return found


def contexts(root: Path, **params: Any) -> Iterator[Context]:
    """Yield a new context for each task."""
    for task in count():
        folder = root / f"task-{task}"
        yield Context(
            job="j",
            stage="s",
            task=task,
            attempt=1,
            params_json=json.dumps(params),
            folder=str(folder),
            cwd=str(folder),
        )


def gathered(results: Iterable[Any], by: str) -> list[list[dict[str, Any]]]:
    """Return the items of a stage that gathers results by a field. Results that are lists are flattened first."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        for element in result if isinstance(result, list) else [result]:
            groups[element[by]].append(element)
    return list(groups.values())


def parts_of_lines(path: Path, folder: Path, size: int, *, header: bool) -> list[File]:
    """Split the file into parts of `size` lines."""
    first, *lines = path.read_bytes().splitlines(keepends=True)
    if not header:
        first, lines = b"", [first, *lines]
    return [_part(folder, start, first + b"".join(lines[start : start + size])) for start in range(0, len(lines), size)]


def parts_of_bytes(path: Path, folder: Path, size: int) -> list[File]:
    """Split the file into parts of about `size` bytes that end at line ends."""
    data, parts, start = path.read_bytes(), [], 0
    while start < len(data):
        end = data.find(b"\n", start + size - 1)
        end = len(data) if end < 0 else end + 1
        parts.append(_part(folder, start, data[start:end]))
        start = end
    return parts


def _part(folder: Path, start: int, data: bytes) -> File:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{start:010d}"
    path.write_bytes(data)
    return File(path)
