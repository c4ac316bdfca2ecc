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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from batchlab.core.errors import UsageError
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

    Return None for a module of the standard library, a module without Python source, or a module that does not exist.
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
        place = next(iter(spec.submodule_search_locations), None)
    else:
        place = spec.origin if spec.origin and spec.origin.endswith(".py") else None
    # The specification of an imported module is not updated if its file is renamed.
    return Path(place) if place and Path(place).exists() else None


_Stats = list[tuple[str, int, int]]
"""Name, modification time in nanoseconds, and size in bytes of each file."""


def _stats(files: Iterable[tuple[str, Path]]) -> _Stats:
    return [(name, info.st_mtime_ns, info.st_size) for name, path in files for info in (path.stat(),)]


class _Scan(NamedTuple):
    """State of a module's files when they were last searched, and the top-level modules that they import."""

    stats: _Stats
    imports: set[str]


class LocalImports:
    """Modules to pack for the functions of one process."""

    def __init__(self, workers_lack: Callable[[dict[str, str]], set[str]]) -> None:
        """`workers_lack` receives the places of modules by name, and returns the names that workers cannot import."""
        self._workers_lack = workers_lack
        self._known: dict[str, Path | None] = {}
        self._scans: dict[str, _Scan] = {}
        self._unusable: set[str] = set()
        """Known modules that were removed or could not be read at the last call of `add`."""
        self._packed: tuple[_Stats, bytes] = ([], b"")

    @property
    def names(self) -> set[str]:
        """Top-level modules that are packed."""
        return {name for name, place in self._known.items() if place} - self._unusable

    def add(self, names: Iterable[str]) -> None:
        """Add the modules with the given names, and the local modules that these modules import.

        Also add the modules that known modules import since their files have changed. A module that cannot be packed
        raises UsageError or OSError only if the modules with the given names import it. New modules that make all
        modules together larger than workers accept raise UsageError, and are not added.
        """
        names = set(names)
        new = {name for name in (*names, *self._known) if self._must_search(name)}
        found: dict[str, Path | None] = {}
        scans: dict[str, _Scan] = {}
        errors: dict[str, Exception] = {}
        while new:
            places = {name: place for name in new if (place := find(name))}
            local = self._workers_lack({name: _origin(place) for name, place in places.items()}) if places else set()
            found |= {name: place if name in local else None for name, place in places.items()}
            for name in local:
                try:
                    scans[name] = _scan(places[name])
                except (UsageError, OSError) as error:
                    errors[name] = error
            imported = {one for name in local & scans.keys() for one in scans[name].imports}
            new = {name for name in imported - found.keys() if self._must_search(name)}
        scans = self._scans | scans
        for name in _closure(names, scans):
            if name in errors:
                raise errors[name]
        packed = {name for name, place in found.items() if place and name not in errors}
        if not packed <= self.names:
            packed |= self.names
            _check_size(sorted(packed), [file for name in packed if name in scans for file in scans[name].stats])
        # A module that cannot be packed must not affect later calls, so the modules are added at the end.
        self._known |= found
        self._scans = scans
        self._unusable = {
            name for name, place in self._known.items() if place and (name in errors or not place.exists())
        }

    def _must_search(self, name: str) -> bool:
        """Return whether the module is new, or its files have changed since the last search for imports."""
        if name not in self._known:
            return True
        place = self._known[name]
        if place is None:
            return False
        try:
            return not place.exists() or name not in self._scans or self._scans[name].stats != _stats(_files(place))
        except (UsageError, OSError):
            return True

    def pack(self) -> bytes:
        """Return a zip of the modules in their current state, or b"" without modules.

        Raise UsageError if the modules together are larger than workers accept.
        """
        names = sorted(self.names)
        places = [place for name in names if (place := self._known[name]) and place.exists()]
        files = dict(sorted(file for place in places for file in _files(place)))
        stats = _stats(files.items())
        _check_size(names, stats)
        if stats != self._packed[0]:
            self._packed = stats, code_cache.pack_files(files)
        return self._packed[1]


def _check_size(names: Iterable[str], stats: _Stats) -> None:
    if len(stats) > code_cache.MAX_FILES or sum(size for _, _, size in stats) > code_cache.MAX_BYTES:
        raise UsageError(
            f"The local modules {', '.join(names)}, which functions import, are too large: the limits are "
            f"{code_cache.MAX_FILES} files and {code_cache.MAX_BYTES / 2**20:.0f} MiB.",
            remedy="Move data out of them, and pass the data as a File.",
        )


def _origin(place: Path) -> str:
    """Return the place of a module as its import specification has it."""
    init = place / "__init__.py"
    return str(init if init.is_file() else place)


def _scan(place: Path) -> _Scan:
    files = list(_files(place))
    sources = [path for name, path in files if name.endswith(".py")]
    return _Scan(_stats(files), {name for path in sources for name in _imports(path)})


def _closure(names: Iterable[str], scans: Mapping[str, _Scan]) -> set[str]:
    """Return the modules with the given names, and all modules that they import."""
    found: set[str] = set()
    new = set(names)
    while new:
        found |= new
        new = {one for name in new & scans.keys() for one in scans[name].imports} - found
    return found


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    if not place.is_dir():
        yield place.name, place
        return
    root = place.resolve()
    for path in code_cache.select_files(place, root, (), MAX_BYTES, package=place.name):
        yield f"{place.name}/{path.relative_to(root).as_posix()}", path


def _imports(file: Path) -> Iterator[str]:
    """Yield the top-level modules that a source file imports, at any place in the file."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # The parser raises RecursionError or MemoryError for deeply nested code, such as generated code. The file may
        # also be a template or a program for another Python. A task that imports it gets Python's own error.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
