"""Foreign text in a terminal is readable and harmless."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.cli.progress import JobDisplay
from batchlab.core.text import process_end, significant, visible, visible_json
from tests.support.cli import a_job, view


@given(st.text())
def test_nothing_but_layout_gets_through(text: str) -> None:
    assert all(c.isprintable() or c in "\n\t\u00a0\u202f" for c in visible(text))
    assert all(c.isprintable() or c in "\u00a0\u202f" for c in visible(text, layout=""))
    clean = "".join(c for c in text if c.isprintable() or c in "\n\t")
    assert visible(clean) == clean


@given(st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
def test_json_is_unchanged(value: object) -> None:
    for indent in (None, 2):
        text = visible_json(value, indent=indent)
        assert json.loads(text) == value
        assert all(c.isprintable() or c in "\n\u00a0\u202f" for c in text)
    assert visible_json("für 日本") == '"für 日本"'


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (3.316e-6, "0.00000332"),
        (-0.00012, "-0.00012"),
        (0.9996, "1"),
        (12.5, "12.5"),
        (1234567, "1,230,000"),
    ],
)
def test_numbers_have_significant_digits_and_no_exponent(number: float, text: str) -> None:
    assert significant(number, 3, ",") == text


@given(st.floats(-1e300, 1e300), st.integers(1, 15))
def test_significant_digits_are_those_of_the_number(number: float, digits: int) -> None:
    text = significant(number, digits)
    assert "e" not in text
    assert float(text) == float(f"{number:.{digits}g}")


def test_end_of_a_process_names_its_signal() -> None:
    texts = [process_end(code) for code in (0, 3, -9, -15, -99)]
    killed = ["killed by SIGKILL, exit -9", "killed by SIGTERM, exit -15", "killed by signal 99, exit -99"]
    assert texts == ["exit 0", "exit 3", *killed]


def test_nothing_of_a_job_is_markup_in_the_picture_that_moves() -> None:
    from rich.console import Console

    odd = "[link=https://evil.example]click[/link]\x1b[2J"
    stage = {**a_job("s-1")["stages"][0], "name": odd}
    picture = JobDisplay(is_live=True)
    picture.show(view(stages=[stage]), None)
    console = Console(width=200, force_terminal=True)
    with console.capture() as drawn:
        console.print(picture.draw())
    assert "[link=https://evil.example]" in drawn.get()
    assert "\x1b]8;" not in drawn.get()
    assert "\x1b[2J" not in drawn.get()
