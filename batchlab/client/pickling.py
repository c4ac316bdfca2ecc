"""Pickling of functions and items, so that a worker can load them.

Invariant: modules that a worker can import are pickled by name, and all others by value.
cloudpickle's settings are restored afterwards.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import sysconfig
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any

import cloudpickle

from batchlab.core.errors import UsageError
from batchlab.core.model import Json
from batchlab.core.protocol import values
from batchlab.core.task_context import File

_REGISTRY = threading.RLock()
"""Held while this module changes cloudpickle's registry, which is global to the process."""

_ASK = """
import importlib.util, json, sys
def place(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
json.dump({name: place(name) for name in sys.argv[1:]}, sys.stdout)
"""


def _with_file(code: CodeType) -> tuple[Any, ...]:
    """Reduce a code object as cloudpickle does, but keep the file name, so that tracebacks show
    it."""
    make, arguments = cloudpickle.Pickler.dispatch_table[CodeType](code)
    named = (code.co_filename if one == "<dynamic-code>" else one for one in arguments)
    return make, tuple(named)


# Not a class statement, because cloudpickle lacks type annotations. The type checker would reject a
# subclass of Any.
_Pickler = type(
    "_Pickler",
    (cloudpickle.Pickler,),
    {"dispatch_table": ChainMap({CodeType: _with_file}, cloudpickle.Pickler.dispatch_table)},
)


def pickled(function: Callable[..., Any]) -> bytes:
    """Pickle a function within `Shipping.by_value`. Raise the error of the pickling."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(function)
    return buffer.getvalue()


class Shipping:
    """Pickling of objects with the knowledge of which modules of this process the workers lack."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._local: list[ModuleType] = []
        """Top-level modules that the workers lack. Their submodules are pickled with them."""

    def function(self, function: Callable[..., Any]) -> bytes:
        """Return the pickled function. Raise UsageError if it cannot be pickled."""
        name = getattr(function, "__qualname__", None) or repr(function)
        if not callable(function):
            raise UsageError(f"{name} is no function.", remedy="Give map something to call.")
        with self.by_value():
            try:
                return pickled(function)
            except Exception as error:
                raise UsageError(
                    f"The function {name} cannot be sent to the workers: "
                    f"{type(error).__name__}: {error}.",
                    remedy="Let it make what it cannot carry (connections, locks, open files), "
                    "instead of using the ones that are here.",
                ) from error

    def items(
        self, items: Sequence[Any], first: int, file: Callable[[File], Json], *, starred: bool
    ) -> list[Json]:
        """Return encoded items, or for `starred` lists of encoded arguments. If an item cannot be
        encoded, raise UsageError with its number, counted from `first`."""
        done: list[Json] = []
        encode = _arguments if starred else values.encode_object
        with self.by_value():
            try:
                for item in items:
                    done.append(encode(item, file))  # noqa: PERF401 - see below
            except values.NotAValue as error:
                # The number of encoded items is the index of the failed one.
                raise UsageError(
                    f"Item {first + len(done)} cannot be sent to the workers: "
                    f"{error.message.rstrip('.')}.",
                    remedy="Nothing was submitted. Send plain data, or what makes the object.",
                ) from error
        return done

    @contextmanager
    def by_value(self) -> Iterator[None]:
        """Make cloudpickle pickle the modules by value that the workers cannot import, during the
        block."""
        with _REGISTRY:
            self._look_around()
            known = cloudpickle.list_registry_pickle_by_value()
            ours = [one for one in self._local if one.__name__ not in known]
            for one in ours:
                cloudpickle.register_pickle_by_value(one)
            try:
                yield
            finally:
                for one in ours:
                    cloudpickle.unregister_pickle_by_value(one)

    def _look_around(self) -> None:
        """Check the modules that were imported since the last call."""
        fresh = sys.modules.keys() - self._seen
        places = {
            name: place
            for name in fresh
            if "." not in name and (place := _place(name)) and not _is_installed(place)
        }
        if places:
            theirs = _workers_places(list(places))
            self._local += [sys.modules[name] for name in places if theirs[name] != places[name]]
        self._seen |= fresh


def _arguments(item: Any, file: Callable[[File], Json]) -> Json:
    try:
        arguments = list(item)
    except TypeError:
        raise values.NotAValue(f"It is {item!r:.60}, and not a sequence of arguments.") from None
    return [values.encode_object(one, file) for one in arguments]


def _place(name: str) -> str | None:
    """Return the file or folder that a module was loaded from. Return None for the standard
    library, for `__main__`, and for modules without a file."""
    module = sys.modules.get(name)
    if name in sys.stdlib_module_names or name == "__main__":
        return None
    folders = getattr(module, "__path__", None) or ()
    return getattr(module, "__file__", None) or next(iter(folders), None)


def _is_installed(place: str) -> bool:
    paths = sysconfig.get_paths()
    return place.startswith((f"{paths['purelib']}/", f"{paths['platlib']}/"))


def _workers_places(names: Sequence[str]) -> dict[str, str | None]:
    """Return the paths from which a worker would load these modules. As in a task's process, -P
    excludes the current folder and the script's folder from the path."""
    answer = subprocess.run(
        [sys.executable, "-P", "-c", _ASK, *names], capture_output=True, text=True, check=True
    )
    found: dict[str, str | None] = json.loads(answer.stdout.splitlines()[-1])
    return found
