"""Lookup of a handler `module:function` without running the user's code, and lookup of the local files of a job file.

Invariants: a job whose handler does not exist is refused before it is submitted. The lookup does not import the
handler's module, because an import may be slow or unsafe, or may fail locally. Symbolic links are not resolved. A
lookup never raises an error, and a path that cannot be accessed counts as missing. A lookup always ends, even if
symbolic links form a cycle.
"""

from __future__ import annotations

import ast
import glob
import os
import sys
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from batchlab.core.atomic_write import CONTROL, STAGED
from batchlab.jobs.yaml_source import nearest


def absolute(path: Path) -> Path:
    """Return `path` as an absolute path without `..`."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve() would follow links


def is_file(path: Path) -> bool:
    """Return whether `path` is an accessible file."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long


def is_folder(path: Path) -> bool:
    """Return whether `path` is an accessible folder."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for a name that is too long


def unfit(name: str) -> str | None:
    """Return the reason why an object's key cannot end in `name`, as the end of a sentence, or None if the key may end
    in `name`.
    """
    if CONTROL.search(name):
        return "holds a control character"
    if STAGED.search(name):
        return "ends in '#' and digits, like a file that a store is still writing"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def matches(pattern: str, folder: Path) -> list[Path]:
    """Return the files that match `pattern` in `folder`, sorted by path.

    A name such as `a[1].csv` may contain special characters of a pattern. If a file has exactly the name `pattern` but
    does not match the pattern, only the file with this name is returned.
    """
    start = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    parts = [part for i, part in enumerate(parts) if part != "**" or parts[i - 1 : i] != ["**"]]
    names = set(_expand(folder, start, parts)) if parts else set()
    paths = [absolute(folder / name) for name in sorted(names) if is_file(folder / name)]
    if is_file(folder / pattern) and absolute(folder / pattern) not in paths:
        # A file has exactly the name `pattern`, so the special characters in the pattern are literal.
        return [absolute(folder / pattern)]
    return paths


def _expand(folder: Path, place: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the paths that match the pattern `parts` in the folder `place`. All paths are relative to `folder`.

    `place` is "" or ends in a slash. The function expands one part of the pattern at a time, because `glob.glob` with
    "**" follows cycles of links, and Path.glob includes hidden files.
    """
    first, rest = parts[0], parts[1:]
    if first == "**":
        for inner in _folders(folder, place):
            yield from _expand(folder, inner, rest or ["*"])
        return
    names = glob.glob(first, root_dir=folder / place)  # noqa: PTH207 - Path.glob includes hidden files
    for name in names:
        if rest:
            yield from _expand(folder, f"{place}{name}/", rest)
        else:
            yield place + name


def _folders(folder: Path, place: str) -> Iterator[str]:
    """Yield `place` and every folder below it that is not hidden, without duplicates.

    If several paths lead to one folder, the function yields the path without links if such a path exists.
    """
    seen: set[tuple[int, int]] = set()
    waiting, linked = deque([place]), deque[str]()
    while waiting or linked:
        here = waiting.popleft() if waiting else linked.popleft()
        with suppress(OSError):  # skip folders that cannot be accessed
            info = os.stat(folder / here)  # noqa: PTH116 - os.stat, for consistency with os.scandir below
            if (info.st_dev, info.st_ino) in seen:
                continue
            seen.add((info.st_dev, info.st_ino))
            yield here
            with os.scandir(folder / here) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and _leads_on(entry):
                        (linked if entry.is_symlink() else waiting).append(f"{here}{entry.name}/")


def _leads_on(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # the entry is a link to itself
        return False


MEND = "Correct the module."
"""Remedy for an invalid module."""


def missing(handler: str, code: Path) -> tuple[str, str] | None:
    """Return the message and the remedy for a missing handler, or None if the handler exists."""
    module, _, function = handler.partition(":")
    source = _in_folder(module, code)
    if source is None:
        return _missing_installed(module, function, code)
    return _missing_in(source, module, function, code)


def _in_folder(module: str, code: Path) -> Path | None:
    base = code.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
        if is_file(path):
            return path
    return None


def _missing_installed(module: str, function: str, code: Path) -> tuple[str, str] | None:
    spec = _find(module)
    if spec is None:
        here = sorted(path.stem for path in code.glob("*.py"))
        close = nearest(module, here)
        remedy = (
            f"Write {close}:{function}."
            if close
            else f"Create {module.replace('.', '/')}.py there, or set 'code' to its folder."
        )
        message = f"there is no module '{module}' in {code}, and none is installed."
        return f"The handler does not exist: {message}", remedy
    if spec.origin and spec.origin.endswith(".py"):
        return _missing_in(Path(spec.origin), module, function, code)
    return None  # A compiled module cannot be parsed, so only the worker detects a missing function.


def _find(module: str) -> ModuleSpec | None:
    """Return a module's spec as importlib.util.find_spec does, but without importing parent packages."""
    path: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        spec = _ask_finders(".".join(parts[:count]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec


def _ask_finders(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    # Search for the module without the current folder, because workers do not run in the folder in which the job file
    # is checked.
    here = {"", str(Path.cwd())}
    for finder in sys.meta_path:
        is_path_finder = path is None and finder is PathFinder
        where = [p for p in sys.path if p not in here] if is_path_finder else path
        spec = finder.find_spec(name, where)
        if spec is not None:
            return spec
    return None


def _missing_in(source: Path, module: str, function: str, code: Path) -> tuple[str, str] | None:
    try:
        names = set(_names(source, code, set()))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        # Catch MemoryError, which the parser raises if the source is nested too deeply for the parser's stack.
        what = error.msg if isinstance(error, SyntaxError) else str(error) or "it nests too deeply"
        return f"{source.name}{line} cannot be read as Python: {what}.", MEND
    if function in names or _ANY in names:
        return None
    close = nearest(function, names)
    if close:
        remedy = f"Did you mean '{module}:{close}'?"
    elif source.is_relative_to(code):
        remedy = f"Define {function} in {source}."
    else:
        remedy = f"Name a function of {source}."
    return f"The handler does not exist: {source.name} has no '{function}'.", remedy


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
READ_BYTES = 1024 * 1024
"""Maximum size in bytes of a module that is parsed.

Parsing takes about a hundred times the size of the module in memory.
"""
_ANY = "*"
"""Placeholder for names that a module defines only when the module runs."""


def _names(source: Path, code: Path, seen: set[Path]) -> Iterator[str]:
    if source in seen:
        return
    seen.add(source)
    if source.stat().st_size > READ_BYTES:
        yield _ANY
        return
    with warnings.catch_warnings():
        # Hide Python's warnings about outdated escapes in strings, which concern only the author of the module.
        warnings.simplefilter("ignore")
        tree = ast.parse(source.read_bytes(), filename=str(source))
    for node in _statements(tree.body):
        if isinstance(node, _SCOPES):
            yield _ANY if node.name == "__getattr__" else node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" and isinstance(node, ast.ImportFrom):
                    yield from _star_imports(node, source, code, seen)
                else:
                    yield (alias.asname or alias.name).split(".")[0]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id


def _star_imports(node: ast.ImportFrom, source: Path, code: Path, seen: set[Path]) -> Iterator[str]:
    module = node.module or ""
    if node.level:
        folder = source.parents[node.level - 1]
        target = _in_folder(module, folder) if module else folder / "__init__.py"
    else:
        target = _in_folder(module, code)
    if target is None:
        yield _ANY
    else:
        yield from _names(target, code, seen)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module's top level, including the statements in the bodies of if, try, and with."""
    for node in body:
        yield node
        if not isinstance(node, _SCOPES):
            for branch in [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                for name in ("body", "orelse", "finalbody"):
                    yield from _statements(getattr(branch, name, []))
