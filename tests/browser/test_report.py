"""The page of a report in a real browser. The page sends no requests, causes no errors, and is readable on any screen
and on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from batchlab.reports.html.failures import Case, Sample
from batchlab.reports.html.page import Page as ReportPage
from batchlab.reports.html.page import render
from batchlab.reports.queries.store import open_store
from tests.support.browser import offences, tab_stops, too_wide
from tests.support.browser import opened as shown
from tests.support.reports.altered import altered
from tests.support.reports.made import Made, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SECTIONS = ("summary", "changes", "workers", "load", "times", "tasks", "cost", "failures")
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
EVIL = "<script>window.evil=1</script><img src=x onerror=evil=1>\"'{{7*7}}&lt;"
TURNED = "a\u202ecba\u0000\n\tb"
SHAPES = ".plot"
"""Shapes that screen readers skip, because texts and tables on the page repeat their content."""
RTL = "שלום עולם"


def _sample(case: Case) -> Sample:
    return Sample(
        f"Traceback (most recent call last):\n  task {case.task}\nValueError: no price",
        "reading row\n\x1b[31mred\x1b[0m <b>bold</b>\n" * 300,
    )


def _written(folder: Path, file: Path, job: str = Made().job, *, samples: bool = True) -> Path:
    with open_store([folder]) as connection:
        found = ReportPage(connection, job, samples=_sample if samples else None, version="1.2.3")
        file.write_text(render(found), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a run with failures and findings."""
    place = tmp_path_factory.mktemp("page")
    folder = write_run(place / "run", Made(tasks=300, workers=5, failing=0.3, share="research"))
    return _written(folder, place / "report.html")


@pytest.fixture
def desk(browser: Browser, file: Path) -> Iterator[Page]:
    with shown(browser, file.as_uri(), viewport=DESK) as (page, seen):
        yield page
        assert seen.errors == []
        assert seen.requests == [file.as_uri()]


def test_report_is_self_contained_and_has_every_section(desk: Page) -> None:
    assert desk.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)") == [*SECTIONS]
    links = desk.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash)")
    assert links == [f"#{name}" for name in SECTIONS]
    assert desk.locator("script, iframe, object, form, img, link[rel=stylesheet]").count() == 0
    assert desk.evaluate("performance.getEntriesByType('resource').length") == 0


def test_the_share_of_the_job_is_next_to_its_other_facts(desk: Page) -> None:
    facts = dict(zip(*(desk.locator(f"header .facts {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert facts["share"] == "research"


def test_its_policy_lets_nothing_in_but_its_own_style(desk: Page) -> None:
    policy = desk.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert policy
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    # The browser applies the style sheet only if its hash is correct.
    assert desk.evaluate("getComputedStyle(document.querySelector('.tiles')).display") == "grid"


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "light"), (DESK, "dark")], ids=["phone-light", "desk-dark"])
def test_axe_finds_nothing(browser: Browser, file: Path, size: dict[str, int], scheme: str) -> None:
    """The check includes contrast in both color schemes, with every collapsible element open."""
    with shown(browser, file.as_uri(), viewport=size, color_scheme=scheme) as (page, seen):
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert offences(page, without=SHAPES) == []
        assert too_wide(page) == []
        assert seen.errors == []


def test_dark_is_dark(browser: Browser, file: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with shown(browser, file.as_uri(), color_scheme=scheme) as (page, _):
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(int(n) for n in re.findall(r"\d+", ground)[:3]) for ground in grounds)
    assert light > 700
    assert dark < 100


def test_keyboard_order_follows_the_report(desk: Page) -> None:
    stops = tab_stops(desk)
    assert stops[0] == "Skip to the summary"
    assert stops[1:9] == [
        "Summary",
        "What to change",
        "Workers",
        "Load and fleet",
        "Times and memory",
        "Tasks",
        "Cost",
        "Failures",
    ]
    tops = desk.evaluate(
        """() => [...document.querySelectorAll('main a, main summary, main input:checked, main [tabindex="0"]')]
          .filter(one => one.checkVisibility())
          .map(one => one.getBoundingClientRect().top)"""
    )
    assert len(stops) - 9 == len(tops)
    assert all(before <= after + 200 for before, after in pairwise(tops))


def test_table_opens_by_keyboard_and_matches_its_chart(desk: Page) -> None:
    summary = desk.locator("#running summary")
    summary.focus()
    desk.keyboard.press("Enter")
    table = desk.locator("#running table")
    assert table.is_visible()
    assert table.locator("tbody tr").count() == 24


def test_every_chart_has_words_and_a_table(desk: Page) -> None:
    charts = desk.locator("[role=img]")
    assert charts.count() >= 8
    for n in range(charts.count()):
        label = charts.nth(n).get_attribute("aria-label") or ""
        assert len(label) > 40
        assert "None" not in label
        assert "nan" not in label.lower()
    without = desk.evaluate(
        """[...document.querySelectorAll('figure')]
          .filter(one => !one.querySelector('table')).map(one => one.id)"""
    )
    assert without == ["split"]  # the chart has a table below it


def test_shown_figures_add_up(desk: Page) -> None:
    """The test reads the numbers that the page shows."""
    stages = _table(desk, "Stages")
    whole = stages.pop()
    for column in range(2, 8):
        assert sum(_number(row[column]) for row in stages) == _number(whole[column])
    for label in ("Cost by purpose", "Cost by stage", "Lines of the bill"):
        rows = _table(desk, label)
        total = _table(desk, label, "tfoot")[0][1]
        assert sum(round(_number(row[1]) * 1e6) for row in rows) == round(_number(total) * 1e6)
    failed = desk.locator(".failure .level").all_inner_texts()
    assert sum(_number(text.split()[0]) for text in failed) == _number(whole[4])


def _table(page: Page, label: str, part: str = "tbody") -> list[list[str]]:
    rows = page.locator(f'[aria-label="{label}"] {part} tr')
    return [rows.nth(n).locator("th, td").all_inner_texts() for n in range(rows.count())]


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def test_samples_are_shown_as_they_were_printed(desk: Page) -> None:
    log = desk.locator(".failure pre").nth(1).inner_text()
    assert r"\x1b[31mred\x1b[0m <b>bold</b>" in log
    assert "characters are left out" in log
    assert len(log) < 5000
    assert "ValueError: no price" in desk.locator(".failure pre").first.inner_text()


def test_on_paper_it_is_light_and_whole(browser: Browser, file: Path, tmp_path: Path) -> None:
    with shown(browser, file.as_uri(), color_scheme="dark") as (page, seen):
        page.emulate_media(media="print", color_scheme="dark")
        ground, text = page.evaluate(
            """() => {
              const style = getComputedStyle(document.body);
              return [style.backgroundColor, style.color];
            }"""
        )
        assert ground == "rgb(255, 255, 255)"
        assert text == "rgb(27, 32, 39)"
        assert not page.locator("nav").is_visible()
        # A reader cannot open a collapsed element on paper.
        assert page.locator(".checks dd").first.is_visible()
        assert page.locator(".failure pre").last.is_visible()
        assert not page.locator("#running table").is_visible()
        pdf = page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        assert seen.errors == []


def test_hostile_names_are_harmless(browser: Browser, tmp_path: Path) -> None:
    """The names of jobs, stages, errors, tags, pools, and instances are hostile."""
    evil = "'" + EVIL.replace("'", "''") + "'"
    turned = "'" + TURNED.replace("\x00", "") + "'"
    stage = f"CASE stage WHEN 'read' THEN {evil} WHEN 'score' THEN '{RTL}' ELSE {turned} END"
    both = f"{stage} AS stage"
    folder = altered(
        write_run(tmp_path / "run", Made(failing=0.3)),
        tmp_path / "evil",
        {
            "jobs": f'{evil} AS name, {turned} AS reason, \'{{"<b>": "\\u202e"}}\' AS tags, '
            f"{evil} AS prices, {evil} AS backend, {evil} AS share",
            "stages": f"{both}, {evil} AS pool",
            "tasks": f"{both}, CASE WHEN fingerprint IS NULL THEN NULL ELSE {evil} END AS fingerprint",
            "attempts": f"{both}, {evil} AS error, {evil} AS reason, CASE WHEN fingerprint IS NULL "
            f"THEN NULL ELSE {evil} END AS fingerprint, {turned} AS kind",
            "bundles": both,
            "workers": f"{both.replace('stage', 'worker')}, instance || {evil} AS instance",
            "instances": f"instance || {evil} AS instance, {evil} AS pool, {evil} AS note",
            "scaling": f"{evil} AS reason, {turned} AS pool",
            "cost": f"{both}, {evil} AS line, {evil} AS how, {evil} AS kind",
            "fleet": f"{turned} AS pool",
        },
    )
    file = _written(folder, tmp_path / "report.html", samples=True)
    with shown(browser, file.as_uri(), viewport=PHONE) as (page, seen):
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert seen.errors == []
        assert seen.requests == [file.as_uri()]
        assert page.evaluate("window.evil") is None
        assert page.locator("script, img, b").count() == 0
        assert too_wide(page) == []
        text = page.evaluate("document.documentElement.textContent")
        assert "\u202e" not in text
        assert r"\u202e" in text
        assert "<script>window.evil=1</script>" in text
        assert "{{7*7}}" in text
        assert f"\u2068{RTL}\u2069" in page.locator("bdi").all_inner_texts()


def test_a_run_of_100_000_tasks_on_1_000_workers_is_a_small_page(browser: Browser, tmp_path: Path) -> None:
    run = Made(tasks=50_000, per_bundle=10, workers=1_000)
    file = _written(write_run(tmp_path / "run", run), tmp_path / "report.html")
    assert file.stat().st_size < 500_000
    with shown(browser, file.as_uri(), viewport=PHONE) as (page, seen):
        assert seen.errors == []
        assert too_wide(page) == []
        assert page.evaluate("document.querySelectorAll('*').length") < 6_000
        assert "100,001 tasks" in page.locator(".words").inner_text()


@pytest.mark.parametrize("left", ["jobs only", "running"])
def test_run_with_little_data_has_a_report(browser: Browser, tmp_path: Path, left: str) -> None:
    source = write_run(tmp_path / "run")
    if left == "jobs only":
        folder = tmp_path / "some"
        folder.mkdir()
        (folder / "jobs.parquet").write_bytes((source / "jobs.parquet").read_bytes())
    else:
        folder = altered(
            source,
            tmp_path / "some",
            {
                "jobs": "false AS is_final, 'RUNNING' AS state, NULL::DOUBLE AS ended_s, "
                "NULL::DOUBLE AS took_s, NULL AS cost_usd, NULL AS prices, 2 AS rounds, "
                "NULL AS tags",
                "stages": "NULL AS planned, NULL AS ended_s",
                "tasks": "CASE WHEN stage = 'read' THEN state ELSE 'PLANNED' END AS state, "
                "CASE WHEN stage = 'read' THEN run_s END AS run_s, NULL AS fingerprint, "
                "CASE WHEN stage = 'read' THEN ended_s END AS ended_s, "
                "CASE WHEN stage = 'read' THEN wait_s END AS wait_s",
                "workers": "NULL AS instance, NULL AS slots, NULL AS pool",
                "instances": "NULL AS in_service_s, NULL AS ended_s, NULL AS boot_s",
                "scaling": "NULL AS before, NULL AS reason, NULL AS backlog_tasks",
                "cost": "NULL AS cost_usd",
                "fleet": "NULL AS desired, NULL AS pending",
            },
        )
    file = _written(folder, tmp_path / "report.html", samples=False)
    with shown(browser, file.as_uri(), viewport=DESK) as (page, seen):
        assert seen.errors == []
        assert too_wide(page) == []
        assert page.locator("main > section").count() == len(SECTIONS)
        text = page.locator("body").inner_text()
        assert "None" not in text.replace("None of", "").replace("None ran", "")
        assert "nan" not in text.split()
