"""Checks of values that another process has written.

Invariant: each check returns a valid value unchanged, and raises ValueError for a value of a wrong type or outside the
bounds. `decode` checks all fields of a dataclass against their annotations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import is_dataclass
from enum import Enum
from functools import cache, lru_cache, partial
from math import isfinite
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from batchlab.core.atomic_write import check_key

T = TypeVar("T")
Read = Callable[[Any], Any]
"""Function that checks a JSON value and returns the value of a field, or raises one of UNREADABLE."""

UNREADABLE = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""Exceptions that a malformed document causes.

Every reader of documents converts the exceptions in UNREADABLE to Malformed.
"""

MAX_TASKS = 1 << 40
"""Maximum index of a task in its stage."""
MAX_IN_BUNDLE = 1 << 16
"""Upper bound of the number of tasks in one bundle. The planner cuts bundles of at most `settlement.CAP` tasks."""
MAX_ROUNDS = 10_000
"""Upper bound of the round of a job, because a worker may look for a plan in every earlier round."""
MAX_COUNT = 1 << 53
"""Upper bound of every counter. A larger counter is not exact in JSON and does not fit into an SQL column."""
MAX_S = 1e11
"""Upper bound of every time in seconds. The epoch second MAX_S is in the year 5138."""
MAX_TEXT = 1 << 20
MAX_KEY = 1024
MAX_INPUT_NAME = 200
"""Maximum length of the name of an input file in the metrics of a task."""
MAX_DEPTH = 256
"""Maximum nesting of a value. `values.encode` refuses values nested deeper than 200 levels."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@#-]{0,199}")
_BUNDLE = re.compile(r"\d{8,13}-\d{8,13}\.\d{1,16}\.\d{1,16}")
_LONGEST_NAME = 200
_known_hints: dict[Any, dict[str, Any]] = {}
_NUMBERS = frozenset({float, int})
_CONTAINERS = frozenset({dict, list})


def text(value: Any, most: int = MAX_TEXT) -> str:
    """Return `value`. Raise ValueError if `value` is not a text of at most `most` characters."""
    if type(value) is str and len(value) <= most:
        return value
    raise ValueError(f"a text of at most {most} characters is expected, not {_kind(value)}")


@lru_cache(maxsize=4096)
def _is_name(value: str) -> bool:
    return _NAME.fullmatch(value) is not None


@lru_cache(maxsize=4096)
def _is_label(value: str) -> bool:
    return _LABEL.fullmatch(value) is not None


def name(value: Any) -> str:
    """Return `value`. Raise ValueError if `value` is not a valid name of a job or a stage."""
    # Check the length of a name first, so that the cache of `_is_name` does not store long texts from other processes.
    if type(value) is str and len(value) <= _LONGEST_NAME and _is_name(value):
        return value
    raise ValueError(f"a name is expected, not {_kind(value)}")


def label(value: Any) -> str:
    """Return `value`. Raise ValueError if `value` is not a valid name of a worker, an instance, a pool, or a queue."""
    if type(value) is str and len(value) <= _LONGEST_NAME and _is_label(value):
        return value
    raise ValueError(f"a label is expected, not {_kind(value)}")


def new_label(value: Any) -> str:
    """Return `value` as `label` does, without the cache of `label`.

    `new_label` checks names of executions and bundles. Few messages repeat the name of an execution or bundle, so a
    cache would not help.
    """
    if type(value) is str and _LABEL.fullmatch(value):
        return value
    raise ValueError(f"a label is expected, not {_kind(value)}")


def bundle_name(value: Any) -> str:
    """Return `value`. Raise ValueError if `value` is not a bundle's id."""
    if type(value) is str and len(value) <= _LONGEST_NAME and _BUNDLE.fullmatch(value):
        return value
    raise ValueError(f"a bundle's id is expected, not {_kind(value)}")


def handler(value: Any) -> str:
    """Return `value`. Raise ValueError if `value` is neither module:function nor a pickled function's key."""
    kind, _, rest = text(value, MAX_KEY).partition(":")
    if kind == "pickle":
        check_key(rest)
        if not rest.startswith("code/"):
            raise ValueError("the key of a pickled function is expected")
    elif not all(part.isidentifier() for part in (*kind.split("."), *rest.split("."))):
        raise ValueError("a handler module:function is expected")
    return str(value)


def flag(value: Any) -> bool:
    """Return `value`. Raise ValueError if `value` is neither True nor False."""
    if type(value) is bool:
        return value
    raise ValueError(f"true or false is expected, not {_kind(value)}")


def figure(value: Any, most: float = MAX_S) -> float:
    """Return `value`. Raise ValueError if `value` is not a number from 0 to `most`."""
    if (type(value) is float or type(value) is int) and 0 <= value <= most:
        return value
    raise ValueError(f"a number from 0 to {most:g} is expected, not {_kind(value)}")


def whole(value: Any, most: int = MAX_COUNT) -> int:
    """Return `value`. Raise ValueError if `value` is not a whole number from 0 to `most`."""
    if type(value) is int and 0 <= value <= most:
        return value
    raise ValueError(f"a whole number from 0 to {most} is expected, not {_kind(value)}")


def integer(value: Any, most: int = MAX_COUNT) -> int:
    """Return `value`. Raise ValueError if `value` is not a whole number from -`most` to `most`."""
    if type(value) is int and -most <= value <= most:
        return value
    raise ValueError(f"a whole number is expected, not {_kind(value)}")


def list_items(value: Any) -> Sequence[Any]:
    """Return `value`. Raise ValueError if `value` is neither a list nor a tuple. A document that was not parsed from
    JSON may have tuples.
    """
    if type(value) is list or type(value) is tuple:
        return value
    raise ValueError(f"a list is expected, not {_kind(value)}")


def figures(value: Any, most: float = MAX_S) -> tuple[float, ...]:
    """Return the numbers in the list `value`.

    Raise ValueError if an element of `value` is not a number from 0 to `most`.
    """
    numbers = tuple(list_items(value))
    if len(numbers) == 1:
        figure(numbers[0], most)
        return numbers
    # Built-in functions are faster than a loop in Python, and `sum` is faster than `max`. The numbers do not include
    # NaN, because `json_format.loads` refuses NaN.
    if numbers and not (
        _NUMBERS.issuperset(map(type, numbers)) and min(numbers) >= 0 and (sum(numbers) <= most or max(numbers) <= most)
    ):
        raise ValueError(f"numbers from 0 to {most:g} are expected")
    return numbers


def fit(value: T) -> T:
    """Return `value`, an instance of a dataclass.

    Raise ValueError if a field has a value that its annotation or the bounds of this module do not allow.
    """
    for field, fits in _tests(cast(Any, type(value))):
        if not fits(getattr(value, field)):
            raise ValueError(f"{field} has a value that it cannot have")
    return value


def _hints(kind: Any) -> dict[str, Any]:
    hints = _known_hints.get(kind)
    if hints is None:
        hints = _known_hints[kind] = get_type_hints(kind)
    return hints


@cache
def _tests(kind: Hashable) -> list[tuple[str, Callable[[Any], bool]]]:
    return [(field, _test(hint)) for field, hint in _hints(kind).items()]


def _test(hint: Any) -> Callable[[Any], bool]:
    """Return the function that tests whether a value has the type `hint` and is within the bounds."""
    simple, origin = getattr(hint, "__supertype__", hint), get_origin(hint)
    if hint is Any:
        return _is_shallow
    if origin in (Union, UnionType):
        tests = [_test(part) for part in get_args(hint)]
        return lambda value: any(test(value) for test in tests)
    if origin is tuple:
        return _tuple_test(get_args(hint))
    if simple is float:
        return lambda value: type(value) in _NUMBERS and abs(value) <= MAX_S
    if simple is int:
        return lambda value: type(value) is int and abs(value) <= MAX_COUNT
    if simple is str:
        return lambda value: type(value) is str and len(value) <= MAX_TEXT
    kind = origin or simple
    return lambda value: isinstance(value, kind)


def _tuple_test(parts: tuple[Any, ...]) -> Callable[[Any], bool]:
    tests = [_test(part) for part in parts if part is not ...]
    if parts[1:] == (...,):
        (test,) = tests
        return lambda value: type(value) is tuple and all(map(test, value))
    return lambda value: (
        type(value) is tuple
        and len(value) == len(tests)
        and all(test(part) for test, part in zip(tests, value, strict=True))
    )


def _is_shallow(value: Any) -> bool:
    shallow([value])
    return True


def shallow(values: Sequence[Any]) -> None:
    """Raise ValueError if a JSON value is nested too deeply or contains a number that is not finite.

    The maximum depth of a JSON value is MAX_DEPTH levels. Python's JSON parser reads the number 1e999, for example, as
    infinity.
    """
    layer = values
    for _ in range(MAX_DEPTH + 1):
        kinds = set(map(type, layer))
        if float in kinds and not _are_finite(layer, kinds):
            raise ValueError("a value holds a number that is not finite")
        if kinds.isdisjoint(_CONTAINERS):
            return
        layer = [
            inner for one in layer if type(one) in _CONTAINERS for inner in (one.values() if type(one) is dict else one)
        ]
    raise ValueError(f"a value is nested deeper than {MAX_DEPTH} levels")


def _are_finite(values: Sequence[Any], kinds: set[type]) -> bool:
    numbers = values if len(kinds) == 1 else [value for value in values if type(value) is float]
    # An infinite number makes the sum infinite. If the sum is infinite, check each number, because a sum of finite
    # numbers may also be too large for a float.
    return isfinite(sum(numbers)) or all(map(isfinite, numbers))


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    return f"{value:.6g}" if isinstance(value, float) else type(value).__name__


def _converter(hint: Any) -> Read | None:
    """Return the function that converts a JSON value to the type `hint`, or None if a conversion is not needed."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        inner = next(filter(None, map(_converter, parts)), None)
        return inner and (lambda value: None if value is None else inner(value))
    if get_origin(hint) is tuple:
        converters = [_converter(part) or (lambda value: value) for part in parts if part is not ...]
        if parts[1:] == (...,):
            return lambda value: tuple(map(converters[0], list_items(value)))
        return lambda value: tuple([convert(one) for convert, one in zip(converters, list_items(value), strict=True)])
    if isinstance(hint, type) and is_dataclass(hint):
        return partial(decode, hint)
    return hint if isinstance(hint, type) and issubclass(hint, Enum) else None


@cache
def _converters(kind: Hashable) -> list[tuple[str, Read | None]]:
    return [(field, _converter(hint)) for field, hint in _hints(kind).items()]


def decode(kind: type[T], doc: Any) -> T:
    """Return the instance of the dataclass `kind` in a document, with the types of the dataclass's annotations.

    A missing field of the document has its default value in the dataclass. Fields that a later batchlab added are
    ignored. Raise one of UNREADABLE if a required field is missing or a field has an invalid value.
    """
    if type(doc) is not dict:
        raise ValueError(f"a document is expected, not {_kind(doc)}")
    values = {
        field: doc[field] if convert is None else convert(doc[field])
        for field, convert in _converters(cast(Any, kind))
        if field in doc
    }
    return fit(kind(**values))
