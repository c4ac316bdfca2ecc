"""The errors that a user can cause. Each error names a remedy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import batchlab

PACKAGE = Path(batchlab.__file__).parent
CAUSED = {"UsageError", "JobFileError"}
SAID_BY_OTHERS = {
    # The text of these errors is that of a service or of its caller.
    "server/autoscaling_api/metadata.py",
    # The errors of the following modules are about archives and results that a user has edited by hand.
    "results.py",
    "worker/code_cache.py",
    # The errors of the following module are programming mistakes.
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
            # A `**` argument may contain the remedy.
            if node.func.id in CAUSED and not given & {"remedy", None}:
                yield f"{name}:{node.lineno}: {ast.unparse(node)[:100]}"


def test_every_error_that_a_user_can_cause_has_a_remedy() -> None:
    assert list(without_remedy()) == []
