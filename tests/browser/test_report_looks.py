"""The look of a report at every width and on paper, and the colors of its charts.

`BATCHLAB_LOOKS=write pytest tests/browser -k looks` writes new reference pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from batchlab.reports.html.failures import Case, Sample
from batchlab.reports.html.page import Page as ReportPage
from batchlab.reports.html.page import render
from batchlab.reports.queries.store import open_store
from tests.support.browser import opened as shown
from tests.support.page_looks import REFERENCES, WIDTHS, Eye, Looks, amiss, eye_of, fit, must
from tests.support.reports.made import Made, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
RUNS = {
    "failed": Made(tasks=300, workers=5, failing=0.3, share="research"),
    "large": Made(tasks=5_000, per_bundle=10, workers=200, failing=0.0),
}
"""A run with a drawing of each bundle, and a run with too many bundles for that."""


def _sample(case: Case) -> Sample:
    return Sample(f"Traceback (most recent call last):\n  task {case.task}\nValueError", "row\n" * 9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("looks")
    found = {}
    for name, run in RUNS.items():
        with open_store([write_run(place / name, run)]) as connection:
            page = ReportPage(connection, run.job, samples=_sample, version="1.2.3")
        found[name] = place / f"{name}.html"
        found[name].write_text(render(page), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def looks() -> Iterator[Looks]:
    kept = Looks(REFERENCES / "report.json")
    yield kept
    kept.close()


@pytest.fixture(scope="module", params=RUNS)
def seen(request: pytest.FixtureRequest, browser: Browser, files: dict[str, Path]) -> Iterator[tuple[Page, Eye, str]]:
    with shown(browser, files[request.param].as_uri(), reduced_motion="reduce") as (page, _), eye_of(page) as eye:
        yield page, eye, request.param


def test_report_fits_every_width(seen: tuple[Page, Eye, str], looks: Looks) -> None:
    page, eye, name = seen
    for size, width in WIDTHS.items():
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            fit(page, width)
            must(amiss(page), f"{name}, {size}")
            if (size, scheme) in (("desk", "light"), ("phone", "dark")):
                looks.compare(page, eye, f"{name}, {size}, {scheme}")


def test_pictures_are_compared(seen: tuple[Page, Eye, str], looks: Looks) -> None:
    looks.must_be_of_this_font(seen[0])


def test_with_all_that_opens_open_it_is_whole_too(seen: tuple[Page, Eye, str]) -> None:
    page, _, name = seen
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for width in (WIDTHS["desk"], WIDTHS["phone"]):
        fit(page, width)
        must(amiss(page), f"{name}, opened, {width} px")
    page.reload()


@pytest.mark.parametrize("size", ["desk", "phone"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_chart_has_the_colours_of_its_legend(seen: tuple[Page, Eye, str], size: str, scheme: Scheme) -> None:
    page, eye, name = seen
    page.emulate_media(color_scheme=scheme)
    fit(page, WIDTHS[size])
    charts = page.locator("figure:has(.chart)")
    assert charts.count() >= 8
    for n in range(charts.count()):
        chart = charts.nth(n)
        # One task among 200 slots is too small to be visible.
        faint = ["merge"] if name == "large" else []
        faults = eye.chart(chart, chart.locator(".plot"), without=faint)
        must(faults, f"{name}, {size}, {scheme}")


def test_the_bar_of_costs_has_the_colours_of_its_table(seen: tuple[Page, Eye, str]) -> None:
    page, eye, _ = seen
    page.emulate_media(color_scheme="light")
    fit(page, WIDTHS["desk"])
    parts = page.evaluate(
        """() => [...document.querySelectorAll("#split .bar path")].map((one) =>
             getComputedStyle(one).fill.match(/[0-9]+/g).slice(0, 3).map(Number))"""
    )
    found = eye.sees(page.locator("#split .bar").screenshot(), parts)
    assert len(parts) >= 4
    assert min(found["near"][:4]) >= 4


def test_on_paper_it_is_whole(seen: tuple[Page, Eye, str]) -> None:
    page, _, name = seen
    page.emulate_media(color_scheme="dark", media="print")
    try:
        fit(page, 794)  # A4 at 96 dots per inch
        must(amiss(page), f"{name}, on paper")
    finally:
        page.emulate_media(media="screen")
