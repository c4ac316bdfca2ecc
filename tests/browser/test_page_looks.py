"""The look of every view of a fixed grid, at three widths, in light and dark.

`BATCHLAB_LOOKS=write pytest tests/browser -k looks` writes new reference pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest

from batchlab.runtime.home import Home
from batchlab.server.http import task_list
from tests.support.browser import offences, opened, place_of, tab_stops
from tests.support.page_looks import REFERENCES, WIDTHS, Eye, Looks, amiss, eye_of, fit, must
from tests.support.server.still_grid import StillGrid
from tests.support.server.still_tables import FAILED, OK, PAUSED, RUNS, WAITS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
PICTURED: Mapping[str, Scheme] = {"desk": "light", "phone": "dark"}
"""The widths at which the test compares small pictures."""
VIEWS = {
    "jobs": "/",
    "active jobs": "/?active=true",
    "failures": "/failures",
    "schedules": "/schedules",
    "schedule": "/schedules/nightly-prices",
    "schedule, paused": "/schedules/month-end",
    "schedule, removed": "/schedules/nightly-prices/remove",
    "grid": "/grid",
    "costs": "/costs",
    "audit log": "/audit",
    "submit": "/submit",
    "job that runs": f"/jobs/{RUNS.id}",
    "job that failed": f"/jobs/{FAILED.id}",
    "job that succeeded": f"/jobs/{OK.id}",
    "job that is paused": f"/jobs/{PAUSED.id}",
    "job that waits": f"/jobs/{WAITS.id}",
    "a job's failures": f"/jobs/{FAILED.id}/failures",
    "a cause": f"/jobs/{FAILED.id}/failures/{{fingerprint}}",
    "tasks of a job that runs": f"/jobs/{RUNS.id}/tasks",
    "failed tasks": f"/jobs/{FAILED.id}/tasks?state=failed",
    "tasks that are searched": f"/jobs/{OK.id}/tasks?search=0003.txt",
    "tasks that no search finds": f"/jobs/{OK.id}/tasks?search=nowhere",
    "timeline of a job that runs": f"/jobs/{RUNS.id}/timeline",
    "timeline of a job that failed": f"/jobs/{FAILED.id}/timeline",
    "timeline of a job that waits": f"/jobs/{WAITS.id}/timeline",
    "a task that runs": f"/jobs/{RUNS.id}/stages/prices/tasks/62250",
    "a task that waits": f"/jobs/{RUNS.id}/stages/prices/tasks/99999",
    "a failed task": f"/jobs/{FAILED.id}/stages/prices/tasks/1",
    "a task that succeeded": f"/jobs/{OK.id}/stages/prices/tasks/3",
    "cancel": f"/jobs/{RUNS.id}/cancel",
    "cap": f"/jobs/{RUNS.id}/cap",
    "scale": "/grid/pools/default",
    "drain": "/grid/drain",
    "not found": "/jobs/nothing",
}
EMPTY = ("jobs", "active jobs", "failures", "schedules", "grid", "costs", "audit log")
SAME_CONTROLS = {
    "active jobs",
    "schedule, paused",
    "job that is paused",
    "job that waits",
    "failed tasks",
    "tasks that are searched",
    "tasks that no search finds",
    "timeline of a job that failed",
    "timeline of a job that waits",
    "a task that waits",
    "a task that succeeded",
}
"""Views with the controls of another view."""
ALSO = 992
"""The width from which tables show columns that do not fit on smaller screens."""

NARROW = 320
"""The width of the narrowest phone."""


@dataclass
class Scene:
    """A logged-in page of a grid that does not change."""

    grid: StillGrid
    page: Page
    eye: Eye

    def show(self, view: str) -> None:
        self.page.goto(f"{place_of(self.page)}{self.path(view)}")
        if view == "grid" and not self.grid.empty:
            self.page.locator("#curve-queue canvas").wait_for()

    def path(self, view: str) -> str:
        path = VIEWS[view]
        if "{fingerprint}" in path:
            group = self.grid.client.failure_groups(FAILED.id)[0]
            path = path.format(fingerprint=group["fingerprint"])
        return path


def logged_in(browser: Browser, grid: StillGrid) -> Iterator[Scene]:
    url = grid.url + grid.client.open_session()["path"]
    with opened(browser, url, timezone_id="Europe/Berlin", reduced_motion="reduce") as (page, _), eye_of(page) as eye:
        page.wait_for_url("**/ui/s/*/")
        yield Scene(grid, page, eye)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StillGrid]:
    with StillGrid(Home(tmp_path_factory.mktemp("still"))) as grid:
        yield grid


@pytest.fixture(scope="module")
def scene(browser: Browser, still: StillGrid) -> Iterator[Scene]:
    yield from logged_in(browser, still)


@pytest.fixture(scope="module")
def nothing(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with StillGrid(Home(tmp_path_factory.mktemp("empty")), empty=True) as grid:
        yield from logged_in(browser, grid)


@pytest.fixture(scope="module")
def looks() -> Iterator[Looks]:
    kept = Looks(REFERENCES / "page.json")
    yield kept
    kept.close()


def keyboard_faults(page: Page) -> list[str]:
    """Return the faults of a page for the keyboard. Each link, button, and field must be a Tab stop, and must look
    different with the focus."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    expected = page.evaluate(
        """() => {
          const all = document.querySelectorAll(
            "a[href], button, summary, select, textarea, input:not([type=hidden]), [tabindex='0']");
          const found = [...all].filter((one) => one.checkVisibility() && !one.closest("dialog"));
          const groups = new Set();
          return found.filter((one) => {
            if (one.type !== "radio") return true;
            const is_new = !groups.has(one.name);
            groups.add(one.name);
            return is_new;
          }).length;
        }"""
    )
    page.evaluate(
        """() => {
          window.unseen = [];
          document.addEventListener("focusin", (event) => {
            const how = getComputedStyle(event.target);
            const outlined = how.outlineStyle !== "none" && parseFloat(how.outlineWidth) >= 2;
            if (!outlined && how.boxShadow === "none" && event.target.matches(":focus-visible")) {
              window.unseen.push(event.target.outerHTML.slice(0, 120));
            }
          });
        }"""
    )
    stops = tab_stops(page)
    unseen = [f"invisible focus: {one}" for one in page.evaluate("window.unseen")]
    return unseen if len(stops) == expected else [f"{len(stops)} of {expected} Tab stops: {stops}", *unseen]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_whole_at_every_width(scene: Scene, looks: Looks, view: str) -> None:
    page = scene.page
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": WIDTHS["desk"], "height": 844})
    scene.show(view)
    must(offences(page), view)
    for size, width in {**WIDTHS, "also": ALSO, "narrow": NARROW}.items():
        fit(page, width)
        must(amiss(page), f"{view}, {width} px")
        if scheme := PICTURED.get(size):
            page.emulate_media(color_scheme=scheme)
            looks.compare(page, scene.eye, f"{view}, {size}, {scheme}")
            page.emulate_media(color_scheme="light")
    page.emulate_media(color_scheme="dark")
    # In dark mode, only the colors differ from what axe has already checked.
    must(offences(page, rules=["color-contrast"]), f"{view}, dark")
    page.emulate_media(color_scheme="light")
    fit(page, WIDTHS["desk"])
    if view not in SAME_CONTROLS:
        must(keyboard_faults(page), f"{view}, keyboard")


def test_a_page_loads_itself_until_all_bundles_are_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_list, "PAGE_ROWS", 2)
    monkeypatch.setattr(task_list, "MAX_ROWS_AT_ONCE", 4)
    scene.grid.served.indexes.clear()
    loads: list[str] = []
    scene.page.on("request", lambda request: loads.append(request.url) if request.is_navigation_request() else None)
    scene.show("failed tasks")
    scene.page.locator(".row-link").first.wait_for()
    assert len(loads) >= 3


def test_pictures_are_compared(scene: Scene, looks: Looks) -> None:
    scene.show("jobs")
    looks.must_be_of_this_font(scene.page)


@pytest.mark.parametrize("view", EMPTY)
def test_empty_views_explain_themselves(nothing: Scene, looks: Looks, view: str) -> None:
    page = nothing.page
    nothing.show(view)
    for width in WIDTHS.values():
        fit(page, width)
        must(amiss(page), f"{view}, {width} px")
    if view != "grid":
        assert page.locator(".empty").first.inner_text().strip()
    looks.compare(page, nothing.eye, f"{view}, empty")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", WIDTHS)
def test_the_curves_are_drawn_in_the_colours_of_their_legends(scene: Scene, size: str, scheme: Scheme) -> None:
    page = scene.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": WIDTHS[size], "height": 844})
    scene.show("grid")
    for name in ("curve-fleet", "curve-queue"):
        chart = page.locator(f"#{name}")
        must(scene.eye.chart(chart, chart.locator("canvas")), f"{size}, {scheme}")


def test_every_bar_has_its_colours(scene: Scene) -> None:
    page = scene.page
    page.emulate_media(color_scheme="light")
    fit(page, WIDTHS["desk"])
    scene.show("jobs")
    colours = page.evaluate(
        """() => Object.fromEntries(["ok", "bad", "run", "off"].map((name) => {
          const on = new OffscreenCanvas(1, 1).getContext("2d");
          on.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
          on.fillRect(0, 0, 1, 1);
          return [name, [...on.getImageData(0, 0, 1, 1).data].slice(0, 3)];
        }))"""
    )
    for job, names in ((RUNS, ("ok", "bad", "run")), (FAILED, ("ok", "bad", "off")), (OK, ("ok",))):
        bar = page.locator(f"#row-{job.id} .bar")
        seen = scene.eye.sees(bar.screenshot(), [colours[name] for name in names])["near"]
        assert min(seen) >= 4, (job.name, dict(zip(names, seen, strict=True)))


def test_on_paper_the_page_is_dark_on_white(scene: Scene) -> None:
    page = scene.page
    page.emulate_media(color_scheme="dark", media="print")
    try:
        scene.show("job that failed")
        ground, text, link = page.evaluate(
            """() => [
              getComputedStyle(document.body).backgroundColor,
              getComputedStyle(document.querySelector("h1")).color,
              getComputedStyle(document.querySelector("main a")).color,
            ]"""
        )
        assert ground == "rgb(255, 255, 255)"
        assert sum(map(int, text[4:-1].split(","))) < 200
        assert sum(map(int, link[4:-1].split(","))) < 400
        assert not page.locator(".places, .tools").first.is_visible()
        must(amiss(page), "on paper")
    finally:
        page.emulate_media(media="screen")


def test_the_login_is_whole(browser: Browser, still: StillGrid, looks: Looks) -> None:
    with opened(browser, f"{still.url}/ui/login", reduced_motion="reduce") as (page, _):
        for scheme, size in zip(SCHEMES, ("desk", "phone"), strict=True):
            page.emulate_media(color_scheme=scheme)
            fit(page, WIDTHS[size])
            must(amiss(page), f"login, {size}")
            must(offences(page), f"login, {scheme}")
            with eye_of(page) as eye:
                looks.compare(page, eye, f"login, {size}, {scheme}")


@pytest.mark.parametrize(
    ("view", "link", "size"),
    [
        ("job that runs", "#cancel", "desk"),
        ("job that runs", "#cap", "phone"),
        ("grid", "#drain", "desk"),
        ("grid", "[data-dialog][aria-label='Scale pool default']", "phone"),
        ("schedule", "#remove", "phone"),
    ],
)
def test_a_question_opens_and_closes_by_keyboard(scene: Scene, view: str, link: str, size: str) -> None:
    """The focus is in the dialog while the dialog is open, and on the link again after the dialog is closed."""
    page = scene.page
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": WIDTHS[size], "height": 844})
    scene.show(view)
    page.locator(link).focus()
    page.keyboard.press("Enter")
    dialog = page.locator("#dialog[open]")
    dialog.wait_for()
    must(amiss(page), f"{view}, {link}, {size}")
    box = dialog.bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= WIDTHS[size]
    for _ in range(8):
        page.keyboard.press("Tab")
        # After the last element, the focus goes to the browser's own controls.
        assert page.evaluate("!!document.activeElement.closest('#dialog, body:not(:has(*:focus))')")
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.evaluate("(link) => document.activeElement.matches(link)", link)
