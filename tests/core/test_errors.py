"""Every error that a user can cause says what to do next."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import batchlab

PACKAGE = Path(batchlab.__file__).parent
CAUSED = {"UsageError", "JobFileError"}
SAID_BY_OTHERS = {
    # In the words of a service, or of what has called it.
    "server/autoscaling_api/metadata.py",
    # Of zips and results that somebody has made by hand, against what batchlab writes.
    "results.py",
    "worker/code_cache.py",
    # A program's own mistake.
    "adapters/docker/engine.py",
}


def without_remedy() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name in SAID_BY_OTHERS:
            continue
        text = path.read_text()
        if not any(f"{one}(" in text for one in CAUSED):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            given = {keyword.arg for keyword in node.keywords}
            # `**` may hold it.
            if node.func.id in CAUSED and not given & {"remedy", None}:
                yield f"{name}:{node.lineno}: {ast.unparse(node)[:100]}"


def test_every_error_that_a_user_can_cause_has_a_remedy() -> None:
    assert list(without_remedy()) == []
