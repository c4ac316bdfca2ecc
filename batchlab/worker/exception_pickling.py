"""Pickling of the exceptions that user code raises on a worker.

Invariant: the caller receives an exception of the type that the task raised if the type itself can be pickled. Parts of
the exception that are too large or cannot be pickled are left out. Every child process imports the module, so it
imports only the standard library.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from functools import cache
from types import MemberDescriptorType
from typing import Any, TypeVar

SAME_TYPE_PREFIX = "@"
"""First character of the text that replaces a pickled exception, before the number of a task whose exception has the
same type. The character is not a digit of base64.
"""

E = TypeVar("E", bound=BaseException)

MAX_PART_BYTES = 1024
"""Maximum size of an attribute or argument that is kept if the whole exception is too large or cannot be pickled."""

_HEAP_TYPE = 1 << 9
"""Flag of a type that a class statement has created (Py_TPFLAGS_HEAPTYPE)."""

_Reduced = tuple[Any, ...]


def pickled(error: BaseException, max_bytes: int | None = None) -> bytes:
    """Return the pickled exception, or b"" if its type cannot be pickled in `max_bytes`."""
    for reduce in (_reduce, _reduce_to_small_parts, _reduce_to_message):
        try:
            data = _dump(error, reduce, max_bytes)
            if isinstance(pickle.loads(data), BaseException):  # noqa: S301 - just pickled
                return data
        except Exception:  # noqa: BLE001, S112 - the parts of an exception may do anything when they are pickled
            continue
    return b""


def create(kind: type[E], args: tuple[Any, ...]) -> E:
    """Return an exception with the arguments `args`, without a call of the user's constructor.

    An exception does not record the arguments of its constructor, only the arguments that its constructor passes on to
    the built-in type.
    """
    base: Any = _built_in_base(kind)
    error: E = base.__new__(kind, *args)
    try:
        base.__init__(error, *args)
    except TypeError:
        # Some types accept only their own arguments, such as UnicodeDecodeError. The object still has `args`.
        error.args = args
    return error


def members(error: BaseException) -> dict[str, Any]:
    """Return the attributes that are not in `__dict__`: slots, and attributes such as `errno` of an OSError."""
    found: dict[str, Any] = {}
    for owner in type(error).__mro__:
        for name, member in vars(owner).items():
            if isinstance(member, MemberDescriptorType) and not name.startswith("__") and hasattr(error, name):
                value = getattr(error, name)
                # A built-in attribute that is not set has the value None, and would be set if it were copied.
                if value is not None or owner.__flags__ & _HEAP_TYPE:
                    found[name] = value
    return found


def set_members(error: BaseException, values: dict[str, Any]) -> None:
    """Set the attributes that `members` has returned for an exception of the same type."""
    for name, value in values.items():
        try:
            setattr(error, name, value)
        except (AttributeError, TypeError):
            continue  # The attribute is read-only.


def _built_in_base(kind: type) -> type:
    while kind.__flags__ & _HEAP_TYPE and kind.__base__:
        kind = kind.__base__
    return kind


class _Buffer(io.BytesIO):
    """Buffer that refuses more than `max_bytes`, so that a large pickle does not fill the memory."""

    def __init__(self, max_bytes: int | None) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def write(self, data: Any) -> int:
        if self._max_bytes is not None and self.tell() + len(data) > self._max_bytes:
            raise ValueError(f"The pickle has more than {self._max_bytes} bytes.")
        return super().write(data)


def _dump(error: Any, reduce: Callable[[BaseException], _Reduced | None], max_bytes: int | None) -> bytes:
    buffer = _Buffer(max_bytes)
    pickler = _pickler()(buffer)
    pickler.reduce = reduce
    pickler.dump(error)
    return buffer.getvalue()


@cache
def _pickler() -> Any:
    import cloudpickle  # cloudpickle is imported late, because its import takes as long as the start of Python.

    def reducer_override(self: Any, obj: Any) -> Any:
        reduced = self.reduce(obj) if isinstance(obj, BaseException) else None
        return reduced or cloudpickle.Pickler.reducer_override(self, obj)

    # Because cloudpickle is untyped, the type checker refuses a class statement with a base class of cloudpickle.
    return type("Pickler", (cloudpickle.Pickler,), {"reducer_override": reducer_override})


def _reduce(error: BaseException) -> _Reduced | None:
    """Reduce a whole exception. Return None for an exception that pickle itself can handle."""
    kind = type(error)
    if _is_overridden(kind, "__reduce__", "__reduce_ex__") or not _is_overridden(
        kind, "__init__", "__new__", "__slots__"
    ):
        return None
    reduced = tuple(error.__reduce__())
    return (_restore, (kind, reduced[1], members(error)), *reduced[2:])


def _is_overridden(kind: type, *names: str) -> bool:
    """Return whether a class statement of the type or of its bases has defined one of the names."""
    own = [vars(owner) for owner in kind.__mro__ if owner.__flags__ & _HEAP_TYPE and not _is_group(owner)]
    return any(name in attributes for attributes in own for name in names)


def _is_group(owner: type) -> bool:
    return owner is ExceptionGroup  # The only built-in exception type that is a heap type.


def _reduce_to_small_parts(error: BaseException) -> _Reduced:
    attributes = {**members(error), **vars(error)}
    small = {name: value for name, value in attributes.items() if _is_small(value)}
    return _restore, (type(error), tuple(map(_small, error.args)), small)


def _reduce_to_message(error: BaseException) -> _Reduced:
    args = error.args if isinstance(error, BaseExceptionGroup) else (str(error)[:MAX_PART_BYTES],)
    return _restore, (type(error), args, {})


def _restore(kind: type[E], args: tuple[Any, ...], values: dict[str, Any]) -> E:
    error = create(kind, args)
    set_members(error, values)
    return error


def _is_small(value: Any) -> bool:
    try:
        _dump(value, _reduce_to_message, MAX_PART_BYTES)
        return True
    except Exception:  # noqa: BLE001 - pickling runs the code of the value
        return False


def _small(value: Any) -> Any:
    """Return the value, or the beginning of a large text, or the name of the value's type."""
    if isinstance(value, str | bytes):
        return value[:MAX_PART_BYTES]
    return value if _is_small(value) or _has_errors(value) else f"<{type(value).__name__}>"


def _has_errors(value: Any) -> bool:
    """Return whether the value is the list of the exceptions in a group, which are reduced one by one."""
    return isinstance(value, list | tuple) and any(isinstance(part, BaseException) for part in value)
