"""Values that `Grid.put` stores once for all tasks of a grid.

A stored value is one object in the bucket. A task receives a reference to the object, and each process of a worker
loads the value once. The program that has stored the value deletes the object.

Invariant: a process loads only content that matches the digest, because a reference comes from a worker or from the
bucket. Every child process may import the module, so the module imports only the standard library and a light module.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from batchlab.core.task_context import File

T = TypeVar("T")

MAX_LOADED_BYTES = 1024**3
"""Limit of the loaded values of a process, as the sum of their pickled sizes. The last value is always kept."""

_files: dict[str, File] = {}
"""Files with the pickled values that this process knows, by digest."""
_loaded: OrderedDict[str, tuple[Any, int]] = OrderedDict()
"""Loaded values and their pickled sizes, by digest. The last entry was used last."""
_lock = threading.RLock()
"""Lock of `_loaded`, held during a load, so that the threads of a task load a value once.

The lock is reentrant, because the code of a value may read another value when it is unpickled.
"""


class StoredFile(File):
    """File whose content is an object in the bucket, without a copy on this machine."""

    __slots__ = ("_reference",)

    def __init__(self, reference: Any) -> None:
        super().__init__(reference["name"])
        self._reference = reference

    def origin(self) -> Any:
        return self._reference


class Shared(Generic[T]):
    """A large value that `Grid.put` has stored. Tasks read it as `shared.value`, as an argument or from a closure.

    A process of a worker loads the value once, and then shares it between its tasks. A task must not change the value.
    The stored value is deleted by `close`, at the end of a `with` block, or when the Grid object is closed.
    """

    __slots__ = ("_delete", "_own", "_stored", "digest", "size")

    _own: T
    """The value itself, in the process that has stored it."""
    _stored: StoredFile
    """The stored object, in the process that has stored the value."""
    _delete: Callable[[], None]
    """Function that deletes the stored object, in the process that has stored the value."""

    def __init__(self, digest: str, size: int) -> None:
        self.digest = digest
        self.size = size

    @property
    def value(self) -> T:
        """Return the stored value."""
        if hasattr(self, "_own"):
            return self._own
        with _lock:
            if self.digest in _loaded:
                _loaded.move_to_end(self.digest)
                value: T = _loaded[self.digest][0]
                return value
            return self._load()

    def _load(self) -> T:
        file = _files.get(self.digest)
        if file is None or isinstance(file, StoredFile):
            raise LookupError(f"{self!r} is not on this machine. Read the value of Grid.put only in tasks.")
        data = Path(file.path).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise ValueError(f"The stored content of {self!r} has changed. Store the value again with Grid.put.")
        value: T = pickle.loads(data)  # noqa: S301 - the user's own value, whose digest is in the user's own task
        _loaded[self.digest] = value, self.size
        total = sum(size for _, size in _loaded.values())
        while total > MAX_LOADED_BYTES and len(_loaded) > 1:
            total -= _loaded.popitem(last=False)[1][1]
        return value

    def close(self) -> None:
        """Delete the stored value, which further tasks cannot read. A repeated call of `close` does nothing.

        Only the program that has stored the value can close it.
        """
        if hasattr(self, "_own"):
            del self._own, self._stored
            self._delete()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        file = getattr(self, "_stored", None) or _files.get(self.digest)
        if file is None:
            raise LookupError(f"{self!r} is closed")
        return _restore, (self.digest, self.size, file)

    def __repr__(self) -> str:
        return f"<Shared {self.digest[:10]}, {self.size} bytes>"


def attach_value(shared: Shared[T], value: T, stored: StoredFile, delete: Callable[[], None]) -> None:
    """Keep the value itself in this process, which has stored it, until the reference is closed or dropped."""
    shared._own, shared._stored, shared._delete = value, stored, delete


def _restore(digest: str, size: int, file: File) -> Shared[Any]:
    # The file of an earlier task may be removed at any time, so the latest copy on this machine is used.
    if digest not in _files or not isinstance(file, StoredFile):
        _files[digest] = file
    return Shared(digest, size)
