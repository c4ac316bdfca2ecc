"""Values as JSON: plain data as it is, files and large values as references, the rest pickled.

Invariant: decoding gives back exactly what was encoded. A dict with a key of one `$` is always a
reference, for a user's own keys that begin with `$` get one more. Imported by every child process:
standard library and `batchlab.core.task_context` only.

    {"$file": key, "name": …, "size": …}                            an object, as a File
    {"$part": key, "start": …, "stop": …, "header": …, "name": …}   some bytes of it, as a File
    {"$value": key, "sha256": …}                                    an encoded value in an object
    {"$pickle": base64, "files": […]}                               any Python object
"""

from __future__ import annotations

import base64
import io
import math
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from batchlab.core.errors import UsageError
from batchlab.core.task_context import File

Json = Any

MAX_DEPTH = 200
_MAX_PATH = 12
# Python refuses to write longer integers as text (4,300 digits).
_MAX_INT_BITS = 14_000


OUTCOME_WEIGHT = 32 * 1024 * 1024
"""Bound of an outcome's weight. Workers write no heavier one, and nobody reads one."""
BRACKET_WEIGHT = 24
"""Weight of a list or a dict beside the byte of its bracket: in memory an empty one takes 64 bytes
or more, so a bound of bytes alone would not bound the memory that a reader needs."""


def weight(text: str) -> int:
    """Return the length of a JSON text plus BRACKET_WEIGHT for each list and dict in it."""
    return len(text) + BRACKET_WEIGHT * (text.count("[") + text.count("{"))


class NotAValue(UsageError):
    """A value that cannot travel; the text says what it is and where it sits."""


class _Odd(Exception):
    """What is odd about a value, and on the way up where it is, innermost part first."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.where: list[str] = []


# --- References ----------------------------------------------------------------------------------


def file_ref(key: str, name: str, size: int) -> Json:
    """The object `key`, which becomes a File called `name` of `size` bytes."""
    return {"$file": key, "name": name, "size": size}


def part_ref(
    key: str, start: int, stop: int, *, name: str, header: tuple[int, int] | None = None
) -> Json:
    """Bytes [start, stop) of an object, after its bytes [a, b) of `header`, as one File."""
    return {
        "$part": key,
        "start": start,
        "stop": stop,
        "header": list(header) if header else None,
        "name": name,
    }


def value_ref(key: str, sha256: str | None = None) -> Json:
    """The object `key` holds the JSON of an encoded value, of that hash where it is given."""
    return {"$value": key, "sha256": sha256} if sha256 else {"$value": key}


def kind(encoded: Json) -> str | None:
    """Which reference this is: "$file", "$part", "$value", "$pickle"; None for plain data."""
    if type(encoded) is dict:
        for name in ("$file", "$part", "$value", "$pickle"):
            if name in encoded:
                return name
    return None


def references(encoded: Json) -> Iterator[Json]:
    """Every reference to an object, at any depth, in the order that `replace` meets them."""
    if type(encoded) is list:
        for one in encoded:
            yield from references(one)
    elif type(encoded) is dict:
        name = kind(encoded)
        if name is None:
            for one in encoded.values():
                yield from references(one)
        elif name == "$pickle":
            yield from references(encoded.get("files", []))
        else:
            yield encoded


def replace(encoded: Json, change: Callable[[Json], Json]) -> Json:
    """The same value with `change(reference)` in the place of every reference to an object."""
    if type(encoded) is list:
        return [replace(one, change) for one in encoded]
    if type(encoded) is dict:
        name = kind(encoded)
        if name is None:
            return {key: replace(one, change) for key, one in encoded.items()}
        if name == "$pickle":
            files = encoded.get("files")
            return {**encoded, "files": replace(files, change)} if files else encoded
        return change(encoded)
    return encoded


def roughly(encoded: Json) -> int:
    """About the bytes of its JSON; writing it only to measure it would take ten times as long."""
    cls = type(encoded)
    if cls is str:
        return 2 + (len(encoded) if encoded.isascii() else len(encoded.encode()))
    if cls is int:
        return 2 + int.bit_length(encoded) // 3
    if cls is list:
        return 2 + sum([roughly(one) + 1 for one in encoded])
    if cls is dict:
        if "$pickle" in encoded:
            return len(encoded["$pickle"]) + 20 + roughly(encoded.get("files", []))
        return 2 + sum([roughly(key) + roughly(one) + 2 for key, one in encoded.items()])
    return 25


# --- Encoding ------------------------------------------------------------------------------------


def no_files(file: File) -> Json:
    """For `encode` where a File has no place."""
    raise NotAValue(f"{file!r} is a file, which has no place here.")


def encode(value: object, file: Callable[[File], Json] = no_files, *, what: str = "result") -> Json:
    """Strict JSON, for jobs that come from a job file; tuples become lists.

    `file` gives the reference for a File. NotAValue for anything else that JSON does not know,
    NaN and infinity included.
    """
    try:
        return _encode(value, file, 0)
    except _Odd as odd:
        path = odd.where[::-1]
        if len(path) > _MAX_PATH:
            path[_MAX_PATH // 2 : -_MAX_PATH // 2] = ["…"]
        where = what + "".join(path)
        raise NotAValue(
            f"{where} is {odd.what}.",
            remedy="JSON knows null, true, false, numbers, text, lists and dicts; "
            "a File may stand for anything else.",
        ) from None


def _encode(value: Any, file: Callable[[File], Json], depth: int) -> Json:
    cls = type(value)
    if value is None or cls is bool:
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _Odd(f"the number {float(value)}, which JSON does not have")
        return float(value)
    if depth > MAX_DEPTH:
        raise _Odd(f"nested deeper than {MAX_DEPTH} levels, or contains itself")
    if isinstance(value, list | tuple):
        return _encode_list(value, file, depth)
    if isinstance(value, dict):
        return _encode_dict(value, file, depth)
    if isinstance(value, File):
        return file(value)
    raise _Odd(f"of type {type_name(cls)}")


def _encode_list(value: Any, file: Callable[[File], Json], depth: int) -> Json:
    done: list[Json] = []
    try:
        for one in value:
            done.append(_encode(one, file, depth + 1))  # noqa: PERF401 - its length is the place
    except _Odd as odd:
        odd.where.append(f"[{len(done)}]")
        raise
    return done


def _encode_dict(value: dict[Any, Any], file: Callable[[File], Json], depth: int) -> Json:
    done: dict[str, Json] = {}
    for key, one in value.items():
        try:
            if not isinstance(key, str):
                raise _Odd(f"under a key of type {type_name(type(key))}; JSON's keys are text")
            plain = _text(key)
            done[f"${plain}" if plain.startswith("$") else plain] = _encode(one, file, depth + 1)
        except _Odd as odd:
            odd.where.append(f"[{_short(key)}]")
            raise
    return done


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Odd(f"text that UTF-8 cannot hold: {_short(value)}") from None
    return value if type(value) is str else str.__str__(value)


def _integer(value: int) -> int:
    if value.bit_length() > _MAX_INT_BITS:
        raise _Odd(f"an integer of {value.bit_length()} bits, too long to be written")
    return value if type(value) is int else int.__int__(value)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def type_name(cls: type) -> str:
    """`numpy.ndarray`, `set`: the name a person looks for."""
    inside = f"{cls.__module__}." if cls.__module__ != "builtins" else ""
    return inside + cls.__qualname__


def encode_object(value: object, file: Callable[[File], Json] = no_files) -> Json:
    """Any object, for the Python API: None, bool, int, finite float and str as JSON, else pickled.

    Files at any depth become references. NotAValue where it cannot be pickled.
    """
    cls = type(value)
    if cls in (type(None), bool, int, float, str):
        try:
            return _encode(value, file, 0)
        except _Odd:
            return _pickle(value, file)
    return file(value) if isinstance(value, File) else _pickle(value, file)


def _pickle(value: object, file: Callable[[File], Json]) -> Json:
    files: list[Json] = []
    buffer = io.BytesIO()
    pickler = _pickler()(buffer)

    def told_of(one: File) -> int:
        files.append(file(one))
        return len(files) - 1

    pickler.told_of = told_of
    try:
        pickler.dump(value)
    except NotAValue:
        raise
    except Exception as error:
        where = type_name(type(value))
        raise NotAValue(
            f"A value of type {where} cannot be pickled: {type(error).__name__}: {error}"
        ) from error
    encoded = {"$pickle": base64.b64encode(buffer.getvalue()).decode()}
    return {**encoded, "files": files} if files else encoded


@cache
def _pickler() -> Any:
    import cloudpickle  # only the Python API needs it, and it takes as long as Python's start

    def persistent_id(self: Any, obj: object) -> int | None:
        number: int | None = self.told_of(obj) if isinstance(obj, File) else None
        return number

    # A class statement would subclass Any: cloudpickle has no types.
    return type("Pickler", (cloudpickle.Pickler,), {"persistent_id": persistent_id})


# --- Decoding ------------------------------------------------------------------------------------


def decode(encoded: Json, file: Callable[[Json], Any], *, pickles: bool) -> Any:
    """The value again; `file` gives what stands for a $file, $part or $value reference.

    With `pickles`, for the Python API alone, it runs code of whoever wrote the value, and raises
    whatever unpickling raises. Without, a pickled object is a NotAValue.
    """
    if type(encoded) is list:
        return [decode(one, file, pickles=pickles) for one in encoded]
    if type(encoded) is not dict:
        return encoded
    name = kind(encoded)
    if name is None:
        return {
            key[1:] if key.startswith("$") else key: decode(one, file, pickles=pickles)
            for key, one in encoded.items()
        }
    if name != "$pickle":
        return file(encoded)
    if not pickles:
        raise NotAValue(
            "It is a pickled object, which a job from a job file never has.",
            remedy="Somebody has forged it; see who may write the bucket and the queues.",
        )
    return _unpickle(encoded, file)


def _unpickle(encoded: Json, file: Callable[[Json], Any]) -> Any:
    files = [file(one) for one in encoded.get("files", [])]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return files[pid]

    return Unpickler(io.BytesIO(base64.b64decode(encoded["$pickle"]))).load()
