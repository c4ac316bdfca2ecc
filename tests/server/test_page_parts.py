"""The parts of the page: its texts, and the files that it ships."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.resources import files

import pytest
from markupsafe import Markup

from batchlab.core.api_types import EtaView
from batchlab.core.pricing.price_book import Usd
from batchlab.server.web import text as words
from tests.support.cli import view

STATIC = files("batchlab.server.web") / "static"
TEMPLATES = files("batchlab.server.web") / "templates"


# --- Words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.00001, "<0.1 ms"),
        (0.0003, "0.3 ms"),
        (0.04, "40 ms"),
        (3.21, "3.2 s"),
        (725, "12 min 05 s"),
        (12_000, "3 h 20 min"),
        (200_000, "2 days 7 h"),
        (-1, "0 s"),
    ],
)
def test_spans(seconds: float | None, text: str) -> None:
    assert words.span(seconds) == text


def test_numbers_and_counts() -> None:
    assert words.number(1_234_567) == "1,234,567"
    assert (words.number(None), words.count(1, "task"), words.count(2, "task")) == ("–", "1 task", "2 tasks")


def test_commands_in_a_sentence_are_code_and_all_else_is_escaped() -> None:
    text = words.ticks("<b>It</b> waits: `batchlab grid scale <x> --auto`.")
    assert text == ("&lt;b&gt;It&lt;/b&gt; waits: <code>batchlab grid scale &lt;x&gt; --auto</code>.")


def test_time_is_shown_for_people_and_machines() -> None:
    assert words.when(0.0) == ('<local-time datetime="1970-01-01T00:00:00+00:00">1970-01-01 00:00:00 UTC</local-time>')
    assert isinstance(words.when(None), Markup)


def test_time_of_another_zone_is_shown_beside() -> None:
    assert words.when(0.0, unless="Europe/Berlin", before="here ") == (
        '<local-time unless="Europe/Berlin" before="here " datetime="1970-01-01T00:00:00+00:00">'
        "here 1970-01-01 00:00:00 UTC</local-time>"
    )


def test_an_amount_is_split_from_how_sure_it_is() -> None:
    assert words.amount(Usd.exactly(1.5)) == ("1.50 USD", "")
    assert words.amount(Usd(0.1, 0.25, 2.0)) == ("0.25 USD", "0.1 to 2.00")


def test_a_name_is_one_part_of_an_address() -> None:
    assert words.path("a/../b?c#d") == "a%2F..%2Fb%3Fc%23d"


def test_a_bar_shows_every_kind_and_never_more_than_all() -> None:
    progress = words.Progress(1_000_000, 999_990, 1, 1, 8)
    assert progress.percent == 99
    assert [part.kind for part in progress.parts] == ["succeeded", "failed", "cancelled", "running"]
    assert all(part.start + part.width <= 100.01 for part in progress.parts)
    assert words.Progress(None, 0, 0, 0, 0).parts == []
    assert words.Progress(10, 10, 0, 0, 0).percent == 100
    told = words.of_job(view()).description
    assert told == "5 of 10 tasks ended: 4 succeeded, 1 failed, 0 canceled, 2 running"


def test_remaining_time_is_separate_from_its_explanation() -> None:
    known: EtaView = {"low_s": 1.0, "high_s": 2.0, "unmeasured": [], "text": "5 s to 9 s left"}
    assert words.to_go(known) == ("5 s to 9 s", "")
    more: EtaView = {**known, "text": "more than 5 s left; stage a not measured yet"}
    assert words.to_go(more) == ("more than 5 s", "stage a not measured yet")
    none: EtaView = {**known, "low_s": None, "text": "unknown: it is paused"}
    assert words.to_go(none) == ("–", "it is paused")


# --- Files ---------------------------------------------------------------------------------------


def test_vendored_files_match_their_list() -> None:
    vendor = STATIC / "vendor"
    listed = json.loads((vendor / "versions.json").read_text())
    for one in listed:
        data = (vendor / one["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == one["sha256"], one["file"]
        licence = (vendor / f"{one['name'].partition('.')[0]}.LICENSE").read_text()
        assert one["licence"] in ("MIT", "0BSD")
        assert "MIT" in licence or "Zero-Clause BSD" in licence
    kept = {one["file"] for one in listed}
    there = {one.name for one in vendor.iterdir()}
    assert {name for name in there if name.endswith((".js", ".css"))} == kept


def test_own_files_load_nothing_foreign_and_run_no_text_as_code() -> None:
    """The content security policy would block such content in a browser. The test names such content."""
    for one in [*STATIC.iterdir(), *TEMPLATES.iterdir()]:
        if not one.is_file():
            continue
        text = one.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|eval\(|new Function|innerHTML\s*=|hx-on|javascript:", text), one
        if one.name.endswith(".html"):
            assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script>|\|\s*safe", text), one
            for form in re.findall(r"<form method=\"post\".*?</form>", text, re.DOTALL):
                assert "form_token" in form or 'id="login"' in form, one
