"""Validation of the plain data of a file against pydantic models, with error messages in terms of the file's keys.

Invariant: an invalid key does not hide later mistakes. A check that concerns several keys still runs unless it depends
on an invalid key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from batchlab.core.model import Json
from batchlab.core.text import show_value
from batchlab.jobs import field_types
from batchlab.jobs.yaml_source import Loc, Problem, nearest, suggest

M = TypeVar("M", bound=BaseModel)

_KINDS = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "model": "a mapping of keys",
    "dict": "a mapping of keys",
}

_PATTERNS = {
    field_types.NAME_PATTERN: ("lower case letters, digits, - and _, beginning with a letter or digit"),
    field_types.PARAM_PATTERN: "letters, digits and _, beginning with a letter",
    field_types.HANDLER_PATTERN: "module:function",
    field_types.SHARE_PATTERN: "letters and digits",
    field_types.SHARE_PREFIX_PATTERN: "letters and digits, which an asterisk may follow",
}


@dataclass(frozen=True, slots=True)
class Shape(Generic[M]):
    """Kind of file, with the model of the file and the texts for its error messages."""

    model: type[M]
    what: str
    """Name of the kind of file, such as "job file"."""
    begin: str
    """Remedy in the error for an empty file."""
    stand_ins: Mapping[str, Json]
    """Values for required keys that are missing. The values are used only until all mistakes of the file are reported.
    """
    free: frozenset[Loc] = frozenset()
    """Locations of mappings whose keys the user chooses. A key that the user chooses need not have a value."""


@dataclass(slots=True)
class Structure(Generic[M]):
    """Result of a validation.

    `whole` is None if the data is too incomplete for further checks. `broken` contains the locations of invalid values.
    Each invalid value was replaced by a stand-in or a default.
    """

    whole: M | None = None
    problems: list[Problem] = field(default_factory=list)
    broken: list[Loc] = field(default_factory=list)

    def sound(self, *places: Loc) -> bool:
        """Return whether all values at, around, and inside `places` are valid.

        "*" in a place matches any key or index.
        """
        return not any(_related(loc, place) for loc in self.broken for place in places)


def validate(data: Json, shape: Shape[M], refused: Collection[Loc | None] = ()) -> Structure[M]:
    """Check `data` against the models of `shape`, and remove and report every invalid value.

    Problems at the locations in `refused` are not reported again.
    """
    structure = Structure[M]()
    if not isinstance(data, dict):
        structure.problems.append(Problem((), f"A {shape.what} is a mapping of keys.", shape.begin))
        return structure
    data = deepcopy(data)
    _drop_empty(data, (), structure, refused, shape.free)
    reported = False
    # Repeat the validation, because the removal of a value can reveal that a key is missing.
    for _ in range(4):
        try:
            structure.whole = shape.model.model_validate(data)
            break
        except ValidationError as error:
            details = error.errors(include_url=False)
            # Report a misspelled or empty key only once, and do not also report the intended key as missing.
            known = {*structure.broken, *(_blamed_location(shape, e) for e in details if e["type"] != "missing")}
            for detail in details:
                again = detail["loc"] in (known if detail["type"] == "missing" else refused)
                if not reported and not again:
                    structure.problems.append(_explain(shape, detail))
                structure.broken.append(_blamed_location(shape, detail))
                _mend(data, detail, shape.stand_ins)
            reported = True
    return structure


def _related(loc: Loc, place: Loc) -> bool:
    return all(a == b or "*" in (a, b) for a, b in zip(loc, place, strict=False))


def _drop_empty(
    data: Any, loc: Loc, structure: Structure[M], refused: Collection[Loc | None], free: Collection[Loc]
) -> None:
    """Remove and report keys without a value. A key without a value is a mistake and does not select the default."""
    if loc in free:
        return
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        if isinstance(value, dict | list):
            _drop_empty(value, (*loc, key), structure, refused, free)
        elif value is None and isinstance(data, dict):
            del data[key]
            at = (*loc, key)
            structure.broken.append(at)
            if at not in refused:
                remedy = "Write one, or delete the line."
                structure.problems.append(Problem(at, f"'{key}' has no value.", remedy))


def keys(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of `model` by their keys in the file."""
    return {
        field.alias or name: field
        for name, field in model.model_fields.items()
        if not field.exclude  # Validators set the excluded fields, which are not keys of the file.
    }


def _place(shape: Shape[M], loc: Loc) -> tuple[type[BaseModel], str] | None:
    """Return the model and the key of `loc`, or of the nearest parent of `loc` that has a model."""
    place: tuple[type[BaseModel], str] | None = None
    annotation: Any = shape.model
    for part in loc:
        annotation = _bare(annotation)
        if _is_model(annotation):
            place = (annotation, str(part))
            field = keys(annotation).get(str(part))
            if field is None:
                break
            annotation = field.annotation
        elif get_origin(annotation) in (list, dict):
            annotation = get_args(annotation)[-1]
        else:
            break
    return place


def _bare(annotation: Any) -> Any:
    """Return the type `annotation` without its checks. For a union, return the alternative that is a model or has type
    arguments.
    """
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        forms_ = [_bare(arg) for arg in get_args(annotation)]
        parted = [form for form in forms_ if get_origin(form) or _is_model(form)]
        return parted[0] if parted else forms_[0]
    return annotation


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _known_fields(shape: Shape[M], loc: Loc) -> dict[str, FieldInfo]:
    """Return the keys that are permitted at the location `loc`."""
    place = _place(shape, loc)
    return keys(place[0]) if place else {}


def _example(shape: Shape[M], loc: Loc) -> str:
    place = _place(shape, loc)
    known = keys(place[0]).get(place[1]) if place else None
    if place is None or known is None:
        return "Write another value."
    examples = known.examples or [""]
    return f"Write for example `{place[1]}: {_flow(examples[0])}`."


def _flow(value: Json) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    if isinstance(value, str) and re.search(r"[{*]", value):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind_of(value: Json) -> str:
    for kind, name in (
        (bool, "true or false"),
        (str, "text"),
        (int | float, show_value(value)),
        (list, "a list"),
        (dict, "a mapping"),
    ):
        if isinstance(value, kind):
            return name
    return "nothing"


def _explain(shape: Shape[M], error: ErrorDetails) -> Problem:
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    name = next((str(part) for part in reversed(loc) if isinstance(part, str)), "")
    value = error["input"]
    if kind == "missing":
        return Problem(loc[:-1], f"'{name}' is missing.", _example(shape, loc), at_key=True)
    if kind == "extra_forbidden":
        known = _known_fields(shape, loc)
        return Problem(loc, f"There is no key '{name}' here.", suggest(name, known, "keys"), True)
    if kind == "refused":
        return Problem(loc, context["message"], context["remedy"])
    if kind in ("literal_error", "enum"):
        words = re.findall(r"'([^']*)'", context["expected"])
        return Problem(loc, f"'{name}' cannot be {show_value(value)}.", suggest(str(value), words, "values"))
    if kind == "string_pattern_mismatch":
        return _pattern(shape, loc, name, str(value), context["pattern"])
    if kind == "string_too_long":
        limit = context["max_length"]
        return Problem(loc, f"'{name}' has more than {limit} characters.", "Write a shorter one.")
    if kind in ("too_short", "too_long") and context["actual_length"]:
        wanted = context["min_length" if kind == "too_short" else "max_length"]
        message = f"'{name}' has {context['actual_length']} entries, and must have {wanted}."
        return Problem(loc, message, _example(shape, loc))
    if kind in ("too_short", "string_too_short"):
        return Problem(loc, f"'{name}' is empty.", _example(shape, loc))
    if kind in _BOUNDS:
        bound = f"{_BOUNDS[kind]} {next(iter(context.values())):g}"
        return Problem(loc, f"'{name}' must be {bound}, not {show_value(value)}.", _example(shape, loc))
    wanted = _KINDS.get(kind.split("_")[0])
    what = f"An entry of '{name}'" if isinstance(loc[-1], int) else f"'{name}'"
    if wanted is None:
        return Problem(loc, f"{what} is wrong: {error['msg']}.", _example(shape, loc))
    return Problem(loc, f"{what} must be {wanted}, not {_kind_of(value)}.", _example(shape, loc))


_BOUNDS = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "above"}


def _pattern(shape: Shape[M], loc: Loc, name: str, value: str, pattern: str) -> Problem:
    takes = f"it must be {_PATTERNS[pattern]}."
    # pydantic reports an error in the key of a dict at the location "[key]".
    if is_key := loc[-1] == "[key]":
        loc = loc[:-1]
        name = str(loc[-2])
    what = f"A name in '{name}'" if is_key else f"'{name}'"
    slug = re.sub(r"[^a-z0-9_]+", "-", value.lower()).strip("-_")[:40]
    rename = slug if pattern == field_types.NAME_PATTERN else ""
    remedy = f"Write {rename}." if rename else _example(shape, loc)
    return Problem(loc, f"{what} cannot be {show_value(value)}: {takes}", remedy, at_key=is_key)


def _blamed_location(shape: Shape[M], error: ErrorDetails) -> Loc:
    loc = error["loc"]
    if error["type"] != "extra_forbidden":
        return loc
    # If a key is misspelled, the key that the user intended is missing, so find the intended key.
    meant = nearest(str(loc[-1]), _known_fields(shape, loc))
    return (*loc[:-1], meant or loc[-1])


def _mend(data: Any, error: ErrorDetails, stand_ins: Mapping[str, Json]) -> None:
    """Remove the invalid key from `data`, or insert a stand-in for a missing key."""
    owner: Any = None
    key: str | int = ""
    here = data
    for part in error["loc"]:
        inside = part in here if isinstance(here, dict) else False
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif inside:
            owner, key = here, part
            here = here[part]
    if error["type"] == "missing" and isinstance(here, dict):
        name = str(error["loc"][-1])
        if name in stand_ins:
            here[name] = deepcopy(stand_ins[name])
    elif owner is not None:
        owner.pop(key, None)
