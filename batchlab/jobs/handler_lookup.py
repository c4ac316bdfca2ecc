"""Lookup of `module:function` without running the user's code.

Invariant: a job whose handler does not exist is refused before anything is queued. Importing the
module is not possible here. Checking a job file must be safe, and imports may be slow or missing.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from batchlab.jobs import paths
from batchlab.jobs.yaml_source import nearest

MEND = "Mend the module."
"""Remedy for an invalid module, whichever of its functions is looked up."""


def missing(handler: str, code: Path) -> tuple[str, str] | None:
    """Return (message, remedy) if the handler does not exist, else None."""
    module, _, function = handler.partition(":")
    source = _in_folder(module, code)
    if source is None:
        return _missing_installed(module, function, code)
    return _missing_in(source, module, function, code)


def _in_folder(module: str, code: Path) -> Path | None:
    base = code.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
        if paths.is_file(path):
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
    return None  # Compiled modules cannot be read. A missing function fails on the worker.


def _find(module: str) -> ModuleSpec | None:
    """Find a module's spec like importlib.util.find_spec, which imports parent packages."""
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
    # Workers do not run in the folder in which the job file is checked.
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
        # The parser raises MemoryError if the nesting exceeds its own stack.
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
"""Larger modules are not parsed. Parsing takes about a hundred times the size in memory."""
_ANY = "*"
"""Represents names that only running the module could reveal."""


def _names(source: Path, code: Path, seen: set[Path]) -> Iterator[str]:
    if source in seen:
        return
    seen.add(source)
    if source.stat().st_size > READ_BYTES:
        yield _ANY
        return
    with warnings.catch_warnings():
        # Hide Python's warnings about outdated escapes. They concern only the author of the module.
        warnings.simplefilter("ignore")
        tree = ast.parse(source.read_bytes(), filename=str(source))
    for node in _statements(tree.body):
        if isinstance(node, _SCOPES):
            yield _ANY if node.name == "__getattr__" else node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*" and isinstance(node, ast.ImportFrom):
                    yield from _starred(node, source, code, seen)
                else:
                    yield (alias.asname or alias.name).split(".")[0]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id


def _starred(node: ast.ImportFrom, source: Path, code: Path, seen: set[Path]) -> Iterator[str]:
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
    """Yield the statements of the module's own scope, including those in if, try, and with."""
    for node in body:
        yield node
        if not isinstance(node, _SCOPES):
            for branch in [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                for name in ("body", "orelse", "finalbody"):
                    yield from _statements(getattr(branch, name, []))
