"""Local modules that functions import while they run on workers.

A function that is pickled by value contains the modules that its own module has imported, but not the modules that an
`import` statement inside the function names. This module finds these statements in the code of the function, and packs
the named modules and the local modules that they import. Workers add the packed modules to their module search path.

Invariants: only modules that workers cannot import are packed, and the same modules give the same bytes. A packed
module is pickled by name, so a worker has one copy of the module, whose types are the types of the caller's module.
"""

from __future__ import annotations

import ast
import dis
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from batchlab.worker import code_cache

_IMPORT = dis.opmap["IMPORT_NAME"]
MAX_BYTES = 64 * 1024 * 1024
"""Limit of the size of one local package, because the whole folder of a package is packed."""


def imported_names(code: CodeType, package: str | None) -> Iterator[str]:
    """Yield the top-level modules that `import` statements in the code and in its nested code name.

    `package` is the package of the code's module, to which relative imports refer.
    """
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from imported_names(constant, package)
    # The search for the byte is fast, and the exact decoding of the instructions is slow.
    if _IMPORT not in code.co_code[::2]:
        return
    values: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opcode == _IMPORT:
            # The instructions before an import load its level, which is 0 for an absolute import, and its names.
            name = (package or "") if values[-2] else str(instruction.argval)
            if name:
                yield name.partition(".")[0]
        if instruction.opname != "EXTENDED_ARG":
            values.append(instruction.argval)


def find(name: str) -> Path | None:
    """Return the file of a module, or the folder of a package, without importing the module.

    Return None for a module of the standard library, and for a module that does not exist or has no Python source.
    """
    if name in sys.stdlib_module_names or name in ("__main__", "batchlab"):
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # A module without a spec, such as one that a program has created itself.
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        folder = next(iter(spec.submodule_search_locations), None)
        return Path(folder) if folder else None
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


_Stats = list[tuple[str, int, int]]
"""Name, modification time in nanoseconds, and size in bytes of each file."""


def _stats(files: Iterable[tuple[str, Path]]) -> _Stats:
    return [(name, info.st_mtime_ns, info.st_size) for name, path in files for info in (path.stat(),)]


class LocalImports:
    """Modules to pack for the functions of one process."""

    def __init__(self, workers_lack: Callable[[dict[str, str]], set[str]]) -> None:
        """`workers_lack` receives the places of modules by name, and returns the names that workers cannot import."""
        self._workers_lack = workers_lack
        self._known: dict[str, Path | None] = {}
        self._scans: dict[str, _Stats] = {}
        self._packed: tuple[_Stats, bytes] = ([], b"")

    @property
    def names(self) -> set[str]:
        """Top-level modules that are packed."""
        return {name for name, place in self._known.items() if place}

    def add(self, names: Iterable[str]) -> None:
        """Add the modules with the given names, and the local modules that these modules import.

        Also add the modules that known modules import since their files have changed.
        """
        new = {name for name in (*names, *self._known) if self._must_search(name)}
        found: dict[str, Path | None] = {}
        scans: dict[str, _Stats] = {}
        while new:
            places = {name: place for name in new if (place := find(name))}
            local = self._workers_lack({name: _origin(place) for name, place in places.items()}) if places else set()
            found |= {name: place if name in local else None for name, place in places.items()}
            scans |= {name: _stats(_files(places[name])) for name in local}
            imported = {name for one in local for file in _sources(places[one]) for name in _imports(file)}
            new = {name for name in imported - found.keys() if self._must_search(name)}
        # A module that cannot be packed must not affect later calls, so the modules are added at the end.
        self._known |= found
        self._scans |= scans

    def _must_search(self, name: str) -> bool:
        """Return whether the module is new, or its files have changed since the last search for imports."""
        if name not in self._known:
            return True
        place = self._known[name]
        return place is not None and (not place.exists() or self._scans[name] != _stats(_files(place)))

    def pack(self) -> bytes:
        """Return a zip of the modules in their current state, or b"" without modules."""
        places = [place for place in list(self._known.values()) if place and place.exists()]
        files = dict(sorted(file for place in places for file in _files(place)))
        stats = _stats(files.items())
        if stats != self._packed[0]:
            self._packed = stats, code_cache.pack_files(files)
        return self._packed[1]


def _origin(place: Path) -> str:
    """Return the place of a module as its import specification has it."""
    init = place / "__init__.py"
    return str(init if init.is_file() else place)


def _sources(place: Path) -> Iterator[Path]:
    return place.rglob("*.py") if place.is_dir() else iter([place])


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    if not place.is_dir():
        yield place.name, place
        return
    root = place.resolve()
    for path in code_cache.select_files(place, root, (), MAX_BYTES):
        yield f"{place.name}/{path.relative_to(root).as_posix()}", path


def _imports(file: Path) -> Iterator[str]:
    """Yield the top-level modules that a source file imports, at any place in the file."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError):
        # The file may be a template or a program for another Python. A task that imports it gets Python's own error.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
