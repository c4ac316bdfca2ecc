"""The parts of a report's page: axes, paths, texts, and amounts."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchlab.core.text import join_list
from batchlab.reports.html import charts
from batchlab.reports.html.charts import SIZES, TIMES, LogAxis, Scale, count_ticks, number_label, size_label, time_ticks
from batchlab.reports.html.source import END, ISOLATE, adding_up, offset, share, visible, visible_lines

times_s = st.floats(0.001, 1e8)
levels = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(times_s)
def test_marks_of_a_time_axis_lie_on_it_and_differ(span_s: float) -> None:
    ticks = time_ticks(span_s)
    assert ticks[0].at == 0
    assert all(0 <= tick.at <= 1 + 1e-6 for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("span_s", "labels"),
    [
        (0.0, ["0"]),
        (54.6, ["0", "10 s", "20 s", "30 s", "40 s", "50 s"]),
        (600.0, ["0", "2 min", "4 min", "6 min", "8 min", "10 min"]),
        (7200.0, ["0", "0.5 h", "1 h", "1.5 h", "2 h"]),
        (86400 * 30.0, ["0", "5 d", "10 d", "15 d", "20 d", "25 d", "30 d"]),
    ],
)
def test_a_time_axis_counts_as_a_person_does(span_s: float, labels: list[str]) -> None:
    assert [tick.label for tick in time_ticks(span_s)] == labels


@given(st.floats(0, 1e12))
def test_an_axis_of_numbers_has_room_for_all(most: float) -> None:
    top, ticks = count_ticks(most)
    assert top * (1 + 1e-6) >= most
    assert ticks[0].at == 0
    assert ticks[-1].at == 1
    assert 2 <= len(ticks) <= 6
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_numbers_with_little_room() -> None:
    assert [number_label(n) for n in (0, 950, 12_000, 150_000, 2.5e6)] == ["0", "950", "12,000", "150k", "2.5M"]


@pytest.mark.parametrize("scale", [TIMES, SIZES], ids=["times", "sizes"])
@given(st.floats(1e-4, 1e12))
def test_a_logarithmic_axis_has_each_value_in_its_bin(scale: Scale, value: float) -> None:
    number = math.floor(math.log10(value) * scale.per_decade)
    axis = LogAxis(number - 3, number + 3, scale)
    low, high = axis.at(axis.edge(number)), axis.at(axis.edge(number + 1))
    assert low - 1e-9 <= axis.at(value) <= high + 1e-9
    assert all(0 <= tick.at <= 1 for tick in axis.ticks())


def test_ticks_of_sizes() -> None:
    def labels(low: float, high: float) -> list[str]:
        first, last = (math.floor(math.log10(edge) * SIZES.per_decade) for edge in (low, high))
        return [tick.label for tick in LogAxis(first, last, SIZES).ticks()]

    assert labels(9e6, 9e7) == ["10 MiB", "20 MiB", "50 MiB"]
    assert labels(9e5, 3e9) == ["1 MiB", "10 MiB", "100 MiB", "1 GiB"]
    assert [size_label(n) for n in (1, 1000, 1024, 1.5 * 1024**2, 1024**5, 2000 * 1024**5)] == [
        *("1 B", "1000 B", "1 KiB", "1.5 MiB", "1 PiB", "2000 PiB")
    ]


def _points(path: str) -> list[tuple[float, float]]:
    """Return the corners of a path with the commands M, V, H, and Z."""
    x = y = 0.0
    found = []
    for kind, one, _, two in re.findall(r"([MVHZ])(-?[\d.]+)?( (-?[\d.]+))?", path):
        if kind == "M":
            x, y = float(one), float(two)
        elif kind == "H":
            x = float(one)
        elif kind == "V":
            y = float(one)
        found.append((x, y))
    return found


@given(levels, st.floats(1, 1e6))
def test_paths_stay_in_their_plot(values: list[float], top: float) -> None:
    known: list[float | None] = list(values)
    paths = [charts.area(values, top, 150.0), charts.line(known, top, 150.0)]
    paths += charts.stack([values, values], top, 150.0)
    for path in filter(None, paths):
        assert all(-0.1 <= x <= 1000.1 and -0.1 <= y <= 150.1 for x, y in _points(path)), path


def test_an_area_has_the_height_of_its_levels() -> None:
    assert charts.area([0, 5, 5, 10], 10, 100) == "M0 100V100H250V50H750V0H1000V100Z"
    assert charts.area([0, 0], 10, 100) == ""
    assert charts.line([None, 5, 5, None, 0], 10, 100) == "M200 50H600M800 100H1000"
    assert charts.stack([[0.0], [0.0]], 10, 100) == ["", ""]


def test_small_values_stay_visible() -> None:
    path = charts.columns([1.0, 0.0, 1e6], 1e6, 100.0)
    assert path.count("M") == 2
    assert "v1.5" in path


amounts = st.lists(st.decimals(0, 10**6, places=12), max_size=40)


@given(amounts, st.integers(0, 6))
def test_rounded_parts_add_up_to_the_rounded_whole(parts: list[Decimal], decimals: int) -> None:
    unit = Decimal(1).scaleb(-decimals)
    rounded = adding_up(parts, decimals)
    assert sum(rounded, Decimal(0)) == sum(parts, Decimal(0)).quantize(unit)
    assert all(abs(a - b) <= unit for a, b in zip(parts, rounded, strict=True))


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 5, "0%"),
        (5, 0, "0%"),
        (1, 10_000, "<0.1%"),
        (3, 100, "3.0%"),
        (42, 100, "42%"),
        (999, 1000, "99.9%"),
        (99_999, 100_000, "99.9%"),
        (5, 5, "100%"),
    ],
)
def test_shares(part: float, whole: float, said: str) -> None:
    assert share(part, whole) == said


def test_moments_of_a_run_are_as_exact_as_it_is_short() -> None:
    assert offset(1.234, 5) == "1.23 s"
    assert offset(61.26, 90) == "61.3 s"
    assert offset(61.26, 900) == "1:01 min"
    assert offset(3661, 9000) == "1:01:01 h"
    assert join_list(["a"]) == "a"
    assert join_list(["a", "b", "c"]) == "a, b and c"
    assert join_list(list("abcdef")) == "a, b, c and 3 more"


@given(st.text())
def test_nothing_unseen_gets_through(text: str) -> None:
    line = visible(text).removeprefix(ISOLATE).removesuffix(END)
    assert line.isprintable()
    assert len(line) <= 200
    assert all(c.isprintable() or c in "\n\t" for c in visible_lines(text))


def test_long_text_keeps_both_ends() -> None:
    text = visible_lines("begin" + "x" * 9000 + "end", 3000)
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "6,008 characters are left out" in text
    assert visible("שלום") == f"{ISOLATE}שלום{END}"
    assert visible("a\u202eb\x00") == r"a\u202eb\x00"


# --- Colours -------------------------------------------------------------------------------------


def _schemes() -> dict[str, dict[str, str]]:
    """Return the colors of the style sheet in light mode, in dark mode, and on paper."""
    style = (Path(charts.__file__).parent / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(blocks) == 3
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", block)) for block in blocks]
    return dict(zip(("light", "dark", "paper"), found, strict=True))


def _contrast(one: str, other: str) -> float:
    """Return the contrast as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark", "paper"])
def test_drawn_colors_contrast_with_the_background(scheme: str) -> None:
    """WCAG 2 (AA) requires 3:1 for meaningful shapes and 4.5:1 for text."""
    colours = _schemes()[scheme]
    shapes = [f"s{n}" for n in range(8)] + [f"c{n}" for n in (0, 1, 3, 4, 5, 6)] + ["wait"]
    for name in shapes:
        assert _contrast(colours[name], colours["card"]) >= 3, name
    for name in ("text", "soft", "link", "good", "bad", "act"):
        assert _contrast(colours[name], colours["card"]) >= 4.5, name
    for ground in ("act", "bad", "good"):
        assert _contrast(colours[ground], colours[f"{ground}-ground"]) >= 4.5, ground
