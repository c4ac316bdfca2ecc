"""The published Python API as text, as in docs/python-api.txt.

    python -m tests.support.public_api --accept

writes that file. Invariant: each public name and each signature is one line, and the text is the
same on every Python that batchlab supports.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import batchlab
from batchlab.core import errors
from tests.support import ROOT

ACCEPT = "python -m tests.support.public_api --accept"
FILE = ROOT / "docs" / "python-api.txt"

MODULES: Mapping[str, tuple[str, ...]] = {
    "batchlab": tuple(batchlab.__all__),
    "batchlab.client": ("Client",),
    "batchlab.client.joblib": ("NAME",),
    "batchlab.errors": tuple(name for name, one in vars(errors).items() if isinstance(one, type) and name[0] != "_"),
    "batchlab.grid.executor": ("GridExecutor",),
    "batchlab.grid.joblib": ("NAME",),
    "batchlab.grid.result": ("JobResult",),
    "batchlab.jobdef": ("RetryRule",),
    "batchlab.model": ("JobState", "Pool"),
}
"""The published names by module: the exports of `batchlab`, and further names in docs/python-api.md."""


def text() -> str:
    """Return the whole API as text. Each name has a line, and class members are indented below their class."""
    lines: list[str] = []
    for module, names in MODULES.items():
        lines += [module, *(f"    {line}" for name in sorted(names) for line in _told(module, name))]
    return "\n".join([*lines, ""])


def _told(module: str, name: str) -> Iterator[str]:
    found = getattr(importlib.import_module(module), name)
    if module != "batchlab" and name in batchlab.__all__:
        assert found is getattr(batchlab, name)
        yield f"{name}: the same as batchlab.{name}"
    elif isinstance(found, type):
        bases = ", ".join(base.__name__ for base in found.__bases__ if base is not object)
        yield f"class {name}({bases})" if bases else f"class {name}"
        yield from (f"    {line}" for line in sorted(_members(found)))
    elif callable(found):
        yield f"{name}{inspect.signature(found)}"
    else:
        yield name


def _members(owner: type) -> Iterator[str]:
    """Yield the members that a class adds to its published bases."""
    if issubclass(owner, enum.Enum):
        yield from (f"{one.name} = {one.value!r}" for one in owner)
        return
    seen: set[str] = set()
    for one in owner.__mro__:
        if one is owner or (one.__module__.startswith("batchlab") and not _is_published(one)):
            for name, member in vars(one).items():
                if name not in seen and (name == "__init__" or name[0] != "_"):
                    seen.add(name)
                    yield _member(name, member)
            # The attributes of a class do not include attributes that only __init__ sets or that do not have a default.
            for name in [*inspect.get_annotations(one), *_set(one)]:
                if name not in seen and name[0] != "_":
                    seen.add(name)
                    yield f"{name}: ..."


def _set(owner: type) -> Iterator[str]:
    """Yield the attributes that the class's own __init__ sets."""
    made = vars(owner).get("__init__")
    if isinstance(made, FunctionType) and not is_dataclass(owner):
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(made)))):
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
                continue
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def _is_published(one: type) -> bool:
    return any(
        one.__name__ in names and getattr(importlib.import_module(module), one.__name__) is one
        for module, names in MODULES.items()
    )


def _member(name: str, member: Any) -> str:
    kind = {classmethod: "classmethod ", staticmethod: "staticmethod "}.get(type(member), "")
    member = getattr(member, "__func__", member)
    if isinstance(member, FunctionType):
        return f"{kind}{name}{inspect.signature(member)}"
    if isinstance(member, property):
        return f"property {name}"
    return f"{name}: ..."


def main() -> None:
    if sys.argv[1:] != ["--accept"]:
        sys.exit(f"Usage: {ACCEPT}")
    FILE.write_text(text())


if __name__ == "__main__":
    main()
