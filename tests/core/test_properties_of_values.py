"""Values, placeholders, and units, which are read back as they were written or are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from batchlab.core import text as units
from batchlab.core.protocol import values
from batchlab.core.task_context import File
from batchlab.jobs import yaml_source
from tests.support.properties import PROPERTY

E = TypeVar("E", bound=Exception)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FILES = st.integers(0, 4).map(lambda number: File(f"/somewhere/{number}", f"name-{number}"))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
KEYS = TEXT | st.sampled_from(["$file", "$part", "$value", "$pickle", "$", "$$", "$$file"])


def tried(call: Callable[[], Any], kind: type[E]) -> tuple[Any, E | None]:
    """Return the result of `call` or its refusal. Any other error of the call is a bug."""
    try:
        return call(), None
    except kind as refusal:
        return None, refusal


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=15
    )


def stored(file: File) -> Any:
    return values.file_ref(f"key/{file.name}", file.name, 1)


def opened(reference: Any) -> File:
    return File(reference["$file"].replace("key/name-", "/somewhere/"), reference["name"])


def shape(value: Any) -> Any:
    """Return a comparable form of a value, in which files are replaced by their paths and names."""
    if isinstance(value, File):
        return ("file", str(value.path), value.name)
    if isinstance(value, list):
        return [shape(one) for one in value]
    if isinstance(value, dict):
        return {key: shape(one) for key, one in value.items()}
    return (type(value), repr(value))


FINITE = PLAIN.filter(lambda value: not isinstance(value, float) or math.isfinite(value))


@PROPERTY
@given(nested(FINITE | FILES))
def test_value_with_files_round_trips(value: Any) -> None:
    for encode in (values.encode, values.encode_object):
        encoded = json.loads(json.dumps(encode(value, stored), allow_nan=False))
        assert shape(values.decode(encoded, opened, pickles=True)) == shape(value)
        found = list(values.references(encoded))
        assert all(values.kind(one) == "$file" for one in found)
        moved = values.replace(encoded, lambda ref: {**ref, "$file": f"there/{ref['$file']}"})
        assert [reference["$file"] for reference in values.references(moved)] == [
            f"there/{one['$file']}" for one in found
        ]


ANYTHING = nested(st.floats() | st.binary(max_size=3) | st.complex_numbers() | st.text(max_size=3) | PLAIN)


@PROPERTY
@given(ANYTHING | st.dictionaries(st.integers(), st.none()) | st.sets(st.integers()))
def test_anything_is_encoded_or_refused_with_a_place(value: Any) -> None:
    encoded, refusal = tried(lambda: values.encode(value), values.NotAValue)
    if refusal:
        assert refusal.message.startswith("result")
        assert refusal.message.isprintable()
        assert refusal.remedy
    else:
        json.dumps(encoded, allow_nan=False, ensure_ascii=False).encode()


# --- Placeholders --------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        "{input}",
        "{inputs}",
        "{inputs_list}",
        "{task}",
        "{scratch}",
        "{code}",
        "{params.k}",
        "{output:a.txt}",
        "{output:d/}",
        "{{",
        "}}",
        "{",
        "}",
        "{}",
        "{output:../x}",
        "x",
        "$ ",
    ]
)
COMMANDS = st.lists(st.lists(PIECES | TEXT, max_size=4).map("".join), max_size=4)
KNOWN = {name: f"<{name}>" for name in ("input", "inputs_list", "task", "scratch", "code", "params.k")}


@PROPERTY
@given(TEXT)
def test_text_in_double_braces_stands_for_itself(text: str) -> None:
    written = text.replace("{", "{{").replace("}", "}}")
    assert values.check(["p", written]) == []
    assert values.expand([written], {}, [], str) == [text]


@PROPERTY
@given(COMMANDS)
def test_checked_templates_can_be_expanded(command: list[str]) -> None:
    if values.check(command, {"k"}):
        return
    made = values.expand(command, KNOWN, ["/1", "/2"], lambda name: f"/out/{name}")
    count = sum(argument == "{inputs}" for argument in command)
    assert len(made) == len(command) + count
    for name in values.outputs(command):
        assert (Path("/out") / name).resolve().is_relative_to("/out")


# --- Units and scalars ---------------------------------------------------------------------------


@PROPERTY
@given(
    st.text(st.sampled_from("0123456789.eE+- smhdkKMGTiB"), max_size=12)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | TEXT
)
def test_a_number_with_a_unit_is_sane_or_refused(value: Any) -> None:
    for parse, most in ((units.seconds, units.LONGEST_S), (units.size_bytes, units.LARGEST_BYTES)):
        found, refusal = tried(partial(parse, value), ValueError)
        if refusal:
            assert len(str(refusal)) < 200
        else:
            assert 0 <= found <= most


@PROPERTY
@given(st.integers(0, 10**6), st.sampled_from(["B", "kB", "MB", "KiB", "MiB", "GiB"]))
def test_size_text_means_its_number(number: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    assert units.size_bytes(f"{number} {unit}") == number * base ** "BKMG".index(unit[0].upper())


@PROPERTY
@given(FINITE.filter(lambda value: not isinstance(value, str) or value.isprintable()))
def test_a_scalar_of_json_is_the_same_in_yaml(value: Any) -> None:
    assert shape(yaml_source.scalar(json.dumps(value, ensure_ascii=False))) == shape(value)


@PROPERTY
@given(st.text() | st.text(st.sampled_from("!&*[]{}:,-?|>'\"#%@` \n\t\0a1"), max_size=30))
def test_any_text_for_a_scalar_has_a_verdict(text: str) -> None:
    _, refusal = tried(lambda: yaml_source.scalar(text), yaml_source.ScalarRefused)
    assert refusal is None or refusal.remedy
