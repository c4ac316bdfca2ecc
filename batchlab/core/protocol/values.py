"""JSON encoding of the inputs and results of tasks.

Plain data is encoded unchanged, files and large values become references, and other objects are pickled.

Invariant: decoding returns a value equal to the encoded value. In encoded JSON, a dict with a key that begins with one
`$` is always a reference, because the encoding adds a second `$` to a user's own keys that begin with `$`. Every child
process imports the module, so the module only imports the standard library and `batchlab.core.task_context`. References
and pickled objects are encoded as follows.

    {"$file": key, "name": …, "size": …}                            an object, as a File
    {"$part": key, "start": …, "stop": …, "header": …, "name": …}   some bytes of it, as a File
    {"$value": key, "sha256": …}                                    an encoded value in an object
    {"$pickle": base64, "files": […]}                               any Python object

The module also expands the placeholders in the command of a job file.

Invariant: `expand` can expand every command that `check` accepts, and the path of an output is always inside the task's
folder. A literal brace in a command is written twice. The placeholders of a command are as follows.

    {input}           path of the task's item        {output:NAME}   path to write an output to
    {inputs}          one argument per item          {params.KEY}    a parameter of the job
    {inputs_list}     a file with a path per line    {task}          index of the task
    {scratch}         the task's own folder          {code}          the job's code folder
"""

from __future__ import annotations

import base64
import io
import math
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from batchlab.core.errors import UsageError
from batchlab.core.task_context import File, name_problem

Json = Any

MAX_DEPTH = 200
_MAX_PATH = 12
# Python refuses to convert integers of more than 4,300 digits to text.
_MAX_INT_BITS = 14_000
_SCALARS = frozenset({type(None), bool, int, float, str})


OUTCOME_WEIGHT = 32 * 1024 * 1024
"""Maximum weight of an outcome, as `weight` calculates it.

Workers do not write outcomes with a larger weight, and readers refuse outcomes with a larger weight.
"""
BRACKET_WEIGHT = 24
"""Additional weight of each list and each dict in a JSON text.

An empty list or dict takes at least 64 bytes in memory, so a limit on the length of a JSON text alone would not limit a
reader's memory.
"""


def weight(text: str) -> int:
    """Return the length of a JSON text plus BRACKET_WEIGHT for each list and each dict in the text."""
    return len(text) + BRACKET_WEIGHT * (text.count("[") + text.count("{"))


class NotAValue(UsageError):
    """Error for a value that cannot be encoded or decoded. The error's text describes the value and its position."""


class _EncodingProblem(Exception):
    """Problem with a value during its encoding. Callers add the position of the value, with the innermost part of the
    position first.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.where: list[str] = []


# --- References ----------------------------------------------------------------------------------


def file_ref(key: str, name: str, size: int) -> Json:
    """Return a reference to the object `key`, which becomes a File called `name` of `size` bytes."""
    return {"$file": key, "name": name, "size": size}


def part_ref(key: str, start: int, stop: int, *, name: str, header: tuple[int, int] | None = None) -> Json:
    """Return a reference to the bytes [start, stop) of an object as one File.

    The content of the File begins with the bytes of the object in the range `header`.
    """
    return {"$part": key, "start": start, "stop": stop, "header": list(header) if header else None, "name": name}


def value_ref(key: str, sha256: str | None = None) -> Json:
    """Return a reference to the object `key`, which contains the JSON of an encoded value.

    `sha256` is the hash of the value's JSON.
    """
    return {"$value": key, "sha256": sha256} if sha256 else {"$value": key}


def kind(encoded: Json) -> str | None:
    """Return the kind of a reference ("$file", "$part", "$value", or "$pickle"), or None for plain data."""
    if type(encoded) is dict:
        for name in ("$file", "$part", "$value", "$pickle"):
            if name in encoded:
                return name
    return None


def is_flat(encoded: Json) -> bool:
    """Return whether an encoded value is a scalar or a list of scalars, so that it is its own decoded value."""
    return type(encoded) in _SCALARS or (type(encoded) is list and _SCALARS.issuperset(map(type, encoded)))


def references(encoded: Json) -> Iterator[Json]:
    """Yield every reference to an object in an encoded value, at any depth, in the order in which `replace` finds the
    references.
    """
    if type(encoded) is list:
        for part in encoded:
            yield from references(part)
    elif type(encoded) is dict:
        name = kind(encoded)
        if name is None:
            for part in encoded.values():
                yield from references(part)
        elif name == "$pickle":
            yield from references(encoded.get("files", []))
        else:
            yield encoded


def replace(encoded: Json, change: Callable[[Json], Json]) -> Json:
    """Return the encoded value with every reference to an object replaced by `change(reference)`."""
    if type(encoded) is list:
        return [replace(part, change) for part in encoded]
    if type(encoded) is dict:
        name = kind(encoded)
        if name is None:
            return {key: replace(part, change) for key, part in encoded.items()}
        if name == "$pickle":
            files = encoded.get("files")
            return {**encoded, "files": replace(files, change)} if files else encoded
        return change(encoded)
    return encoded


def roughly(encoded: Json) -> int:
    """Return the approximate number of bytes of an encoded value's JSON.

    The computation of the exact number would take ten times as long as this estimate, because the function would have
    to write the value as JSON.
    """
    cls = type(encoded)
    if cls is str:
        return 2 + (len(encoded) if encoded.isascii() else len(encoded.encode()))
    if cls is int:
        return 2 + int.bit_length(encoded) // 3
    if cls is list:
        return 2 + sum([roughly(part) + 1 for part in encoded])
    if cls is dict:
        if "$pickle" in encoded:
            return len(encoded["$pickle"]) + 20 + roughly(encoded.get("files", []))
        return 2 + sum([roughly(key) + roughly(part) + 2 for key, part in encoded.items()])
    return 25


# --- Encoding ------------------------------------------------------------------------------------


def no_files(file: File) -> Json:
    """Raise NotAValue, because the value to encode must not contain a File."""
    raise NotAValue(f"{file!r} is a file, and files are not allowed here.")


def encode(value: object, file: Callable[[File], Json] = no_files, *, what: str = "result") -> Json:
    """Return the encoding of a value as strict JSON, for a job from a job file. Tuples become lists in the encoded
    value.

    `file` returns the reference for a File. Raise NotAValue for any other value that JSON does not have, including NaN
    and infinity.
    """
    try:
        return _encode(value, file, 0)
    except _EncodingProblem as odd:
        path = odd.where[::-1]
        if len(path) > _MAX_PATH:
            path[_MAX_PATH // 2 : -_MAX_PATH // 2] = ["…"]
        where = what + "".join(path)
        raise NotAValue(
            f"{where} is {odd.what}.",
            remedy="JSON knows null, true, false, numbers, text, lists and dicts; use a File for other data.",
        ) from None


def _encode(value: Any, file: Callable[[File], Json], depth: int) -> Json:
    cls = type(value)
    if value is None or cls is bool:
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            raise _EncodingProblem(f"an integer of {value.bit_length()} bits, too long to be written")
        return value if cls is int else int.__int__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _EncodingProblem(f"the number {float(value)}, which JSON does not have")
        return float(value)
    if depth > MAX_DEPTH:
        raise _EncodingProblem(f"nested deeper than {MAX_DEPTH} levels, or contains itself")
    if isinstance(value, list | tuple):
        return _encode_list(value, file, depth)
    if isinstance(value, dict):
        return _encode_dict(value, file, depth)
    if isinstance(value, File):
        return file(value)
    raise _EncodingProblem(f"of type {type_name(cls)}")


def _encode_list(value: Any, file: Callable[[File], Json], depth: int) -> Json:
    done: list[Json] = []
    try:
        for item in value:
            done.append(_encode(item, file, depth + 1))  # noqa: PERF401 - the loop reads the length of `done`
    except _EncodingProblem as odd:
        odd.where.append(f"[{len(done)}]")
        raise
    return done


def _encode_dict(value: dict[Any, Any], file: Callable[[File], Json], depth: int) -> Json:
    done: dict[str, Json] = {}
    for key, item in value.items():
        try:
            if not isinstance(key, str):
                raise _EncodingProblem(f"under a key of type {type_name(type(key))}; JSON's keys are text")
            plain = _text(key)
            done[f"${plain}" if plain.startswith("$") else plain] = _encode(item, file, depth + 1)
        except _EncodingProblem as odd:
            odd.where.append(f"[{_short(key)}]")
            raise
    return done


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _EncodingProblem(f"text that UTF-8 cannot represent: {_short(value)}") from None
    return value if type(value) is str else str.__str__(value)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def type_name(cls: type) -> str:
    """Return the name of a type for a person, such as `numpy.ndarray` or `set`."""
    inside = f"{cls.__module__}." if cls.__module__ != "builtins" else ""
    return inside + cls.__qualname__


def encode_object(value: object, file: Callable[[File], Json] = no_files) -> Json:
    """Return the encoding of any object, for the Python API.

    A value of None, bool, int, finite float, or str becomes JSON. All other objects are pickled. Files at any depth
    become references. Raise NotAValue if the object cannot be pickled.
    """
    cls = type(value)
    if cls in _SCALARS:
        if (cls is int and value.bit_length() < 64) or (cls is str and value.isascii()):  # type: ignore[attr-defined]
            return value  # These are most arguments of small tasks.
        try:
            return _encode(value, file, 0)
        except _EncodingProblem:
            return _pickle(value, file)
    return file(value) if isinstance(value, File) else _pickle(value, file)


def _pickle(value: object, file: Callable[[File], Json]) -> Json:
    files: list[Json] = []
    buffer = io.BytesIO()
    pickler = _pickler()(buffer)

    def number_of(found: File) -> int:
        files.append(file(found))
        return len(files) - 1

    pickler.told_of = number_of
    try:
        pickler.dump(value)
    except NotAValue:
        raise
    except Exception as error:
        where = type_name(type(value))
        raise NotAValue(f"A value of type {where} cannot be pickled: {type(error).__name__}: {error}") from error
    encoded = {"$pickle": base64.b64encode(buffer.getvalue()).decode()}
    return {**encoded, "files": files} if files else encoded


@cache
def _pickler() -> Any:
    # Only the Python API needs cloudpickle, and the import of cloudpickle takes as long as the start of Python.
    import cloudpickle

    def persistent_id(self: Any, obj: object) -> int | None:
        number: int | None = self.told_of(obj) if isinstance(obj, File) else None
        return number

    # Because cloudpickle is untyped, the type checker refuses a class statement with a base class of cloudpickle.
    return type("Pickler", (cloudpickle.Pickler,), {"persistent_id": persistent_id})


# --- Decoding ------------------------------------------------------------------------------------


def decode(encoded: Json, file: Callable[[Json], Any], *, pickles: bool) -> Any:
    """Return the value of an encoding. The function `file` returns the value of a $file, $part, or $value reference.

    With `pickles`, which is for the Python API only, unpickling runs code from the writer of the value and may raise
    any exception. Without `pickles`, raise NotAValue for a pickled object.
    """
    if type(encoded) is list:
        return [decode(part, file, pickles=pickles) for part in encoded]
    if type(encoded) is not dict:
        return encoded
    name = kind(encoded)
    if name is None:
        return {
            key[1:] if key.startswith("$") else key: decode(part, file, pickles=pickles)
            for key, part in encoded.items()
        }
    if name != "$pickle":
        return file(encoded)
    if not pickles:
        raise NotAValue(
            "It is a pickled object, which a job from a job file never has.",
            remedy="The object is forged. Check who may write to the bucket and the queues.",
        )
    return _unpickle(encoded, file)


def _unpickle(encoded: Json, file: Callable[[Json], Any]) -> Any:
    files = [file(reference) for reference in encoded.get("files", [])]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return files[pid]

    return Unpickler(io.BytesIO(base64.b64decode(encoded["$pickle"]))).load()


_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_SINGLE = ("input", "inputs_list", "task", "scratch", "code")
_KNOWN = (*(f"{{{name}}}" for name in (*_SINGLE, "inputs")), "{output:NAME}", "{params.KEY}")


def check(template: Sequence[str], params: Collection[str] | None = None) -> list[str]:
    """Return a sentence for each problem of a command's placeholders. `params` has the keys of the job's parameters."""
    problems = [] if template else ["The command is empty."]
    for argument in template:
        for token in _TOKEN.finditer(argument):
            if problem := _problem(argument, token, params):
                problems.append(problem)  # noqa: PERF401 - a comprehension hides the two loops
    if template and "{inputs}" in template[0]:
        problems.append("The program itself cannot be {inputs}.")
    return problems


def _problem(argument: str, token: re.Match[str], params: Collection[str] | None) -> str | None:
    text, name = token[0], token[1]
    if text in ("{{", "}}"):
        return None
    if name is None:
        return f"A single '{text}' in {argument!r}: write it twice to mean the character."
    if name == "inputs":
        return None if text == argument else f"{{inputs}} must stand alone, not in {argument!r}."
    if name.startswith("output:"):
        output = name.removeprefix("output:")
        problem = name_problem(output.removesuffix("/"))
        return f"The output name {output!r} {problem}." if problem else None
    if name.startswith("params."):
        key = name.removeprefix("params.")
        known = params is None or key in params
        return None if key and known else f"The job has no parameter {key!r} for {text}."
    if name in _SINGLE:
        return None
    return f"There is no placeholder {text}; there are {', '.join(_KNOWN)}."


def used_keys(template: Sequence[str]) -> list[str]:
    """Return the names of the placeholders in a command, in order and without duplicates."""
    return list(dict.fromkeys(_names(template)))


def outputs(template: Sequence[str]) -> list[str]:
    """Return the names of the outputs in a command, in order and without duplicates.

    The name of a folder ends in a slash.
    """
    names = (name.removeprefix("output:") for name in used_keys(template) if name.startswith("output:"))
    return list(names)


def _names(template: Sequence[str]) -> Iterator[str]:
    for argument in template:
        for token in _TOKEN.finditer(argument):
            if token[1] is not None:
                yield token[1]


def expand(
    template: Sequence[str], values: Mapping[str, str], inputs: Sequence[str], output: Callable[[str], str]
) -> list[str]:
    """Return the arguments of a command with every placeholder replaced by its value.

    `values` has the values of those placeholders that do not have a parameter of their own. Raise KeyError if the value
    of a placeholder is missing.
    """

    def one(token: re.Match[str]) -> str:
        if token[1] is None:
            return token[0][0]
        name = token[1]
        return output(name.removeprefix("output:")) if name.startswith("output:") else values[name]

    arguments: list[str] = []
    for argument in template:
        if argument == "{inputs}":
            arguments.extend(inputs)
        else:
            arguments.append(_TOKEN.sub(one, argument))
    return arguments
