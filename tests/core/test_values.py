"""Values as JSON, which come back exactly, with files and large values as references."""

from __future__ import annotations

import datetime
import enum
import json
import math
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchlab.core.protocol import values
from batchlab.core.task_context import Context, File, name_problem

TEXT = st.text(st.characters(codec="utf-8"))
KEYS = st.one_of(TEXT, st.sampled_from(["$file", "$part", "$value", "$pickle", "$", "$$", "$$file"]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(KEYS, inner)),
    max_leaves=20,
)


def wire(encoded: Any) -> Any:
    """Convert an encoded value to JSON text and back, as a message does."""
    return json.loads(json.dumps(encoded, allow_nan=False, ensure_ascii=False).encode())


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal with equal types and equal bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def refuse(_: Any) -> Any:
    raise AssertionError("there is no reference in it")


@given(JSON)
@example({"$file": {"$$file": [{"$value": "x"}]}})
@example([-0.0, 1e308, 2**63, "\u2028"])
def test_json_round_trips_exactly(value: Any) -> None:
    encoded = values.encode(value)
    assert same(values.decode(wire(encoded), refuse, pickles=True), value)
    assert list(values.references(encoded)) == []


@given(JSON)
def test_python_api_objects_round_trip_exactly(value: Any) -> None:
    assert same(values.decode(wire(values.encode_object(value)), refuse, pickles=True), value)


@pytest.mark.parametrize("value", [None, True, 7, 1.5, "text", ""])
def test_the_python_api_leaves_plain_scalars_readable(value: Any) -> None:
    assert values.encode_object(value) is value


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        [1, 2],
        {"a": 1},
        (1, 2),
        b"\x00\xff",
        "\ud800",
        10**5000,
        datetime.date(2026, 1, 31),
        {1, 2},
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_python_api_pickles_everything_else(value: Any) -> None:
    encoded = wire(values.encode_object(value))
    assert values.kind(encoded) == "$pickle"
    assert values.decode(encoded, refuse, pickles=True) == value


def test_the_python_api_carries_nan_and_functions_of_the_main_module() -> None:
    assert math.isnan(values.decode(values.encode_object(math.nan), refuse, pickles=True))
    seven = 7
    assert values.decode(values.encode_object(lambda: seven), refuse, pickles=True)() == 7


class Colour(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


def test_subclasses_of_plain_types_become_the_plain_type() -> None:
    pair = namedtuple("pair", "a b")
    encoded = values.encode({Colour.RED: [Colour.RED, Size.BIG, pair(1, (2,))]})
    assert same(encoded, {"red": ["red", 3, [1, [2]]]})


class Odd:
    pass


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "result is of type set"),
        ({"a": [0, {"b": b"x"}]}, "result['a'][1]['b'] is of type bytes"),
        ([Odd()], f"result[0] is of type {__name__}.Odd"),
        ({"x": {3: "three"}}, "result['x'][3] is under a key of type int"),
        ([0.0, math.nan], "result[1] is the number nan"),
        ({"m": math.inf}, "result['m'] is the number inf"),
        ("\udcff", "result is text that UTF-8 cannot represent"),
        (10**5000, "result is an integer of"),
        (Path("x"), "result is of type pathlib."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_refusal_names_the_type_and_where_it_sits(value: Any, says: str) -> None:
    with pytest.raises(values.NotAValue) as refusal:
        values.encode(value)
    assert says in str(refusal.value)


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(values.NotAValue, match="contains itself"):
        values.encode(loop)


def test_unpicklable_value_is_refused_with_its_type(tmp_path: Path) -> None:
    with (
        (tmp_path / "x").open("wb") as file,
        pytest.raises(values.NotAValue, match="list cannot be pickled: TypeError"),
    ):
        values.encode_object([file])


@pytest.mark.parametrize("encode", [values.encode, values.encode_object])
def test_files_at_any_depth_become_references_and_files_again(encode: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    file = File(tmp_path / "a.txt")

    def stored(one: File) -> Any:
        return values.file_ref(f"files/{one.name}", one.name, one.size)

    encoded = wire(encode([{"deep": [file]}, 1], stored))
    assert list(values.references(encoded)) == [{"$file": "files/a.txt", "name": "a.txt", "size": 1}]
    moved = values.replace(encoded, lambda ref: {**ref, "$file": "elsewhere"})
    assert values.decode(moved, lambda ref: ref["$file"], pickles=True) == [{"deep": ["elsewhere"]}, 1]
    assert values.decode(encoded, lambda ref: ref["$file"], pickles=True) == [{"deep": ["files/a.txt"]}, 1]


def test_a_file_where_none_may_be_is_refused() -> None:
    with pytest.raises(values.NotAValue, match="are not allowed here"):
        values.encode([File("/nowhere")])


@given(JSON)
def test_replacing_nothing_changes_nothing(value: Any) -> None:
    encoded = [values.encode(value), values.part_ref("k", 3, 9, name="n", header=(0, 3))]
    assert same(values.replace(encoded, lambda ref: ref), encoded)
    assert [values.kind(ref) for ref in values.references(encoded)] == ["$part"]


# --- Values in user code -------------------------------------------------------------------------


def a_context(folder: Path, cwd: Path | None = None) -> Context:
    return Context(
        job="j", stage="s", task=3, attempt=1, params_json='{"deep": [1]}', folder=str(folder), cwd=str(cwd or "")
    )


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a\\b", "a\nb", "x" * 300, "part#1"]
)
def test_an_unsafe_output_name_is_refused(name: str, tmp_path: Path) -> None:
    assert name_problem(name)
    with pytest.raises(ValueError, match="cannot save"):
        a_context(tmp_path).save(b"", name)
    assert values.check(["x", f"{{output:{name}}}"])


def test_save_moves_what_is_the_tasks_own_and_copies_the_rest(tmp_path: Path) -> None:
    ctx = a_context(tmp_path / "task", tmp_path / "cwd")
    (tmp_path / "cwd").mkdir()
    foreign, own, here = tmp_path / "input", ctx.scratch / "own", tmp_path / "cwd" / "here"
    for path in (foreign, own, here):
        path.write_text(path.name)
    linked = ctx.scratch / "link"
    linked.symlink_to(foreign)
    for path in (foreign, own, here, linked):
        assert ctx.save(path, f"kept/{path.name}").read_text() == (path.resolve().name)
    assert foreign.exists()
    assert not own.exists()
    assert not here.exists()
    assert not ctx.saved["kept/link"].path.is_symlink()
    assert ctx.save(b"bytes", "b").size == 5
    with pytest.raises(ValueError, match="saved that name before"):
        ctx.save(b"again", "b")


def test_saved_files_whose_names_differ_in_case_are_different_files(tmp_path: Path) -> None:
    """The file system of a Mac ignores case and the Unicode form of a letter."""
    ctx = a_context(tmp_path)
    names = ["Report.csv", "report.csv", "caf\u00e9", "cafe\u0301", "a", "A/b"]
    files = [ctx.save(name.encode(), name) for name in names]
    assert [file.name for file in files] == names
    assert [file.read_text() for file in files] == names
    paths = [str(file.path.relative_to(tmp_path)) for file in files]
    assert paths == ["out/Report.csv", "out/2-report.csv", "out/caf\u00e9", "out/2-cafe\u0301", "out/a", "out/2-A/b"]


def test_parameters_are_a_copy_of_each_tasks_own(tmp_path: Path) -> None:
    first, second = a_context(tmp_path), a_context(tmp_path)
    first.params["deep"].append(2)
    assert first.params == {"deep": [1, 2]}
    assert second.params == {"deep": [1]}


# --- Placeholders --------------------------------------------------------------------------------


def test_placeholders_expand() -> None:
    assert values.expand(
        ["p", "-i{input}", "{inputs}", "{{{task}}}", "{output:a.b}x", "{params.k}"],
        {"input": "/i", "task": "7", "params.k": "v"},
        ["/1", "/2"],
        lambda name: f"/out/{name}",
    ) == ["p", "-i/i", "/1", "/2", "{7}", "/out/a.bx", "v"]


def test_values_are_not_expanded_again() -> None:
    assert values.expand(["{params.k}"], {"params.k": "{task}"}, [], str) == ["{task}"]


def test_outputs_and_used_names_are_ordered_and_unique() -> None:
    template = ["{output:b}", "{output:a/}", "{output:b}", "{task}"]
    assert values.outputs(template) == ["b", "a/"]
    assert values.used_keys(template) == ["output:b", "output:a/", "task"]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("{inptu}", "There is no placeholder {inptu}; there are {input}"),
        ("{", "A single '{'"),
        ("a}", "A single '}'"),
        ("{}", "There is no placeholder {}"),
        ("-i{inputs}", "must stand alone"),
        ("{output:../x}", "The output name '../x' must not"),
        ("{params.missing}", "no parameter 'missing'"),
        ("{params.}", "no parameter ''"),
    ],
)
def test_a_wrong_placeholder_is_explained(argument: str, says: str) -> None:
    problems = values.check(["program", argument], {"known"})
    assert len(problems) == 1
    assert says in problems[0]


def test_right_commands_pass() -> None:
    template = ["awk", "{{print}}", "{input}", "{inputs}", "{inputs_list}", "{output:d/a.txt}"]
    assert values.check([*template, "{params.k}{task}", "{scratch}/x", "{code}"], {"k"}) == []
    assert values.check([*template, "{params.any}"]) == []


def test_an_empty_command_and_a_list_as_program_are_refused() -> None:
    assert values.check([]) == ["The command is empty."]
    assert values.check(["{inputs}"]) == ["The program itself cannot be {inputs}."]
