"""From plain data to the validated models, with every mistake said in words of the job file.

Invariant: a key that is wrong does not hide the mistakes after it: the checks across keys still
run on the rest, except those that depend on what is broken.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from batchlab.model import Json
from batchlab.spec import forms
from batchlab.spec.problems import Loc, Problem, nearest, suggest
from batchlab.spec.schema import SECTIONS, JobSpec, general
from batchlab.spec.units import shown

_STAND_INS: Mapping[str, Json] = {
    "name": "unnamed",
    "input": {"files": "-"},
    "files": "-",
    "by": "-",
}

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
    forms.NAME_PATTERN: "lower case letters, digits, - and _, beginning with a letter or digit",
    forms.PARAM_PATTERN: "letters, digits and _, beginning with a letter",
    forms.HANDLER_PATTERN: "module:function",
}


@dataclass(slots=True)
class Structure:
    """`job` is None where too little is left to look at; `broken` are the places that were wrong
    and that stand-ins or defaults fill."""

    job: JobSpec | None = None
    problems: list[Problem] = field(default_factory=list)
    broken: list[Loc] = field(default_factory=list)

    def sound(self, *places: Loc) -> bool:
        """Whether nothing was wrong at, around or inside any of `places` ("*": anywhere)."""
        return not any(_related(general(loc), place) for loc in self.broken for place in places)


def validate(data: Json, refused: Collection[Loc | None] = ()) -> Structure:
    """Check `data` against the models; whatever is wrong is left out and reported, except what
    lies at `refused`, which has been reported before."""
    found = Structure()
    if not isinstance(data, dict):
        found.problems.append(
            Problem((), "A job file is a mapping of keys.", "Write name:, input: and stages:.")
        )
        return found
    data = deepcopy(data)
    _drop_empty(data, (), found, refused)
    reported = False
    # Leaving out one value can uncover that a key is missing, hence a second and third look.
    for _ in range(3):
        try:
            found.job = JobSpec.model_validate(data)
            break
        except ValidationError as error:
            details = error.errors(include_url=False)
            # A key that is misspelt or has no value is told as that, not as missing too.
            known = {*found.broken, *(_blamed(e) for e in details if e["type"] != "missing")}
            for one in details:
                again = one["loc"] in (known if one["type"] == "missing" else refused)
                if not reported and not again:
                    found.problems.append(_explain(one))
                found.broken.append(_blamed(one))
                _mend(data, one)
            reported = True
    return found


def _related(loc: Loc, place: Loc) -> bool:
    return all(a == b or "*" in (a, b) for a, b in zip(loc, place, strict=False))


def _drop_empty(data: Any, loc: Loc, found: Structure, refused: Collection[Loc | None]) -> None:
    """A key without a value is a slip, not a wish for the default."""
    if loc == ("params",):
        return
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        if isinstance(value, dict | list):
            _drop_empty(value, (*loc, key), found, refused)
        elif value is None and isinstance(data, dict):
            del data[key]
            at = (*loc, key)
            found.broken.append(at)
            if at not in refused:
                remedy = "Write one, or delete the line."
                found.problems.append(Problem(at, f"'{key}' has no value.", remedy))


def _fields(loc: Loc) -> tuple[type[BaseModel], str] | None:
    """The model and field that `loc` is in, None where it is below the user's own keys."""
    for length in range(len(loc) - 1, -1, -1):
        model = SECTIONS.get(general(loc[:length]))
        if model is not None:
            return model, str(loc[length])
    return None


def _example(loc: Loc) -> str:
    place = _fields(loc)
    if place is None or place[1] not in place[0].model_fields:
        return "Write another value."
    examples = place[0].model_fields[place[1]].examples or [""]
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
        (int | float, shown(value)),
        (list, "a list"),
        (dict, "a mapping"),
    ):
        if isinstance(value, kind):
            return name
    return "nothing"


def _explain(error: ErrorDetails) -> Problem:
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    name = next((str(part) for part in reversed(loc) if isinstance(part, str)), "")
    value = error["input"]
    if kind == "missing":
        return Problem(loc[:-1], f"'{name}' is missing.", _example(loc), at_key=True)
    if kind == "extra_forbidden":
        known = SECTIONS[general(loc[:-1])].model_fields
        return Problem(loc, f"There is no key '{name}' here.", suggest(name, known, "keys"), True)
    if kind == "refused":
        return Problem(loc, context["message"], context["remedy"])
    if kind == "literal_error":
        words = re.findall(r"'([^']*)'", context["expected"])
        return Problem(
            loc, f"'{name}' cannot be {shown(value)}.", suggest(str(value), words, "values")
        )
    if kind == "string_pattern_mismatch":
        return _pattern(loc, name, str(value), context["pattern"])
    if kind == "string_too_long":
        limit = context["max_length"]
        return Problem(loc, f"'{name}' has more than {limit} characters.", "Write a shorter one.")
    if kind in ("too_short", "string_too_short"):
        return Problem(loc, f"'{name}' is empty.", _example(loc))
    if kind in _BOUNDS:
        bound = f"{_BOUNDS[kind]} {context['ge' if 'ge' in context else 'le']:g}"
        return Problem(loc, f"'{name}' must be {bound}, not {shown(value)}.", _example(loc))
    wanted = _KINDS.get(kind.split("_")[0])
    what = f"An entry of '{name}'" if isinstance(loc[-1], int) else f"'{name}'"
    if wanted is None:
        return Problem(loc, f"{what} is wrong: {error['msg']}.", _example(loc))
    return Problem(loc, f"{what} must be {wanted}, not {_kind_of(value)}.", _example(loc))


_BOUNDS = {"greater_than_equal": "at least", "less_than_equal": "at most"}


def _pattern(loc: Loc, name: str, value: str, pattern: str) -> Problem:
    takes = f"it takes {_PATTERNS[pattern]}."
    if pattern == forms.PARAM_PATTERN:
        # pydantic places an error of a dict's key under "[key]".
        return Problem(
            loc[:-1], f"No parameter can be named {shown(value)}: {takes}", _example(loc[:-1])
        )
    slug = re.sub(r"[^a-z0-9_]+", "-", value.lower()).strip("-_")[:40]
    rename = slug if pattern == forms.NAME_PATTERN else ""
    remedy = f"Write {rename}." if rename else _example(loc)
    return Problem(loc, f"'{name}' cannot be {shown(value)}: {takes}", remedy)


def _blamed(error: ErrorDetails) -> Loc:
    loc = error["loc"]
    if error["type"] != "extra_forbidden":
        return loc
    # A misspelt key leaves the key it was meant for unset.
    meant = nearest(str(loc[-1]), SECTIONS[general(loc[:-1])].model_fields)
    return (*loc[:-1], meant or loc[-1])


def _mend(data: Any, error: ErrorDetails) -> None:
    """Take the faulty key out of `data`, or put a stand-in where one is missing."""
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
        if name in _STAND_INS:
            here[name] = deepcopy(_STAND_INS[name])
    elif owner is not None:
        owner.pop(key, None)
