"""Whether `module:function` exists, found out without running a line of the user's code.

Invariant: a handler that does not exist is refused before anything is queued; importing it here
is not an option, since a job file must be safe to check and its imports may be heavy or missing.
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
"""The remedy where the module is wrong, whichever of its functions is asked for."""


def missing(handler: str, code: Path) -> tuple[str, str] | None:
    """Why the handler cannot be called, as (sentence, remedy); None where it is there."""
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
    return None  # Compiled modules cannot be read; the worker finds out.


def _find(module: str) -> ModuleSpec | None:
    """importlib.util.find_spec, but it would import the parents of a dotted name."""
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
    # The workers do not run in the folder where the job file was checked.
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
        # The parser says MemoryError where its own stack has no room for the nesting.
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
"""Of a module; a larger one is data, and to parse it takes some hundred times its size."""
_ANY = "*"
"""Stands for names that only running the module could tell."""


def _names(source: Path, code: Path, seen: set[Path]) -> Iterator[str]:
    if source in seen:
        return
    seen.add(source)
    if source.stat().st_size > READ_BYTES:
        yield _ANY
        return
    with warnings.catch_warnings():
        # Python warns of old escapes while it parses; that is between the module and its author.
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
    """The statements that run in the module's own scope, those inside if, try and with too."""
    for node in body:
        yield node
        if not isinstance(node, _SCOPES):
            for branch in [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                for name in ("body", "orelse", "finalbody"):
                    yield from _statements(getattr(branch, name, []))
