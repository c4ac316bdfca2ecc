"""The web page in a real browser, on a real grid with a running, a failed, and a paused job."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from batchlab.cli import grid as grid_page
from batchlab.core.model import Pool
from tests.support.browser import ELSEWHERE, Seen, offences, opened, place_of, too_wide
from tests.support.grid.local_grid import LocalGrid
from tests.support.server.api import TOKEN, Rig

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route, ViewportSize

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE: ViewportSize = {"width": 320, "height": 844}
NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>'\""
JOB = """\
name: {name}
input: {{files: data/*.txt, split: lines, size: 1}}
params: {{nap_s: 0.0, bad: 0}}
tags: {{owner: "<script>alert(3)</script>"}}
stages:
  - name: parse
    python: handlers:parse
    bundle: 1
    retry: 1
  - name: total
    python: handlers:total
    gather: all
"""
CODE = f"""\
import time

def parse(part, ctx):
    number = int(part.path.read_text())
    print("number", number)
    time.sleep(ctx.params["nap_s"])
    if number <= ctx.params["bad"]:
        if number % 2:
            raise ValueError(f"number {{number}} has " + {NASTY!r})
        raise SystemExit(7)
    return number

def total(numbers):
    return sum(numbers)
"""


@dataclass
class Scene:
    """A grid, and its jobs by their behavior."""

    grid: LocalGrid
    folder: Path
    runs: str
    failed: str
    paused: str


def folder_of(place: Path, name: str, numbers: int) -> Path:
    (place / name / "data").mkdir(parents=True)
    (place / name / "job.yaml").write_text(JOB.format(name=name))
    (place / name / "handlers.py").write_text(CODE)
    (place / name / "data" / "numbers.txt").write_text("".join(f"{number}\n" for number in range(1, numbers + 1)))
    return place / name


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    place = tmp_path_factory.mktemp("page")
    grid = LocalGrid(place / "home", [Pool("default", max_size=2, slots=1)])
    try:
        failing = folder_of(place, "fails", 8) / "job.yaml"
        slow = folder_of(place, "runs", 2000) / "job.yaml"
        failed = grid.submit(failing, bad="5")["id"]
        grid.wait(failed)
        paused = grid.submit(slow, token="paused", nap_s="0.5")["id"]
        grid.client.pause(paused)
        runs = grid.submit(slow, token="runs", nap_s="0.5")["id"]
        grid.wait(runs, until=lambda view: view["stages"][0]["succeeded"] > 0)
        yield Scene(grid, place, runs, failed, paused)
    finally:
        grid.stop()


@contextmanager
def logged_in(scene: Scene, browser: Browser, path: str = "/") -> Iterator[tuple[Page, Seen]]:
    """Open a page as `grid open` does, go to `path`, and check the page's errors at the end."""
    client = scene.grid.client
    with opened(browser, client.url + client.open_session()["path"], **DESKTOP) as (page, seen):
        page.wait_for_url("**/ui/s/*/")
        if path != "/":
            page.goto(f"{place_of(page)}{path}")
        yield page, seen
        assert seen.errors == []
        assert [request for request in seen.requests if not request.startswith(client.url)] == []


def views(scene: Scene) -> list[str]:
    groups = scene.grid.client.failure_groups(scene.failed)
    first = groups[0]["first"]
    failed = f"/jobs/{scene.failed}"
    return [
        "/",
        "/?active=true",
        "/failures",
        "/grid",
        "/costs",
        "/audit",
        "/submit",
        "/schedules",
        f"/jobs/{scene.runs}",
        failed,
        f"/jobs/{scene.paused}",
        f"{failed}/tasks",
        f"{failed}/timeline",
        f"/jobs/{scene.runs}/timeline",
        f"{failed}/failures",
        f"{failed}/failures/{groups[0]['fingerprint']}",
        f"{failed}/stages/{first['stage']}/tasks/{first['task']}?seq={first['seq']}",
        f"/jobs/{scene.runs}/cancel",
        f"/jobs/{scene.runs}/cap",
        "/grid/pools/default",
        "/grid/drain",
        "/costs/cap",
    ]


# --- Looking -------------------------------------------------------------------------------------


def test_every_view_is_sound(scene: Scene, browser: Browser) -> None:
    """The browser and axe do not report errors, no request goes to another host, and no page is too wide."""
    paths = views(scene)
    with logged_in(scene, browser) as (page, seen):
        for path in paths:
            page.set_viewport_size(DESKTOP["viewport"])
            page.goto(f"{place_of(page)}{path}")
            assert page.locator("h1").count() == 1, path
            # test_page_looks.py runs axe on every view. The names and logs of this test's grid are hostile.
            if path in (*paths[:1], *paths[8:16]):
                assert offences(page) == [], path
            assert too_wide(page) == [], path
            page.set_viewport_size(PHONE)
            assert too_wide(page) == [], path
            assert seen.errors == [], path


def test_code_of_an_address_works_once(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser) as (page, seen):
        assert page.url == f"{place_of(page)}/"
        assert not [request for request in seen.requests[1:] if "#" in request]
        page.go_back()
        assert "#" not in page.url


def test_a_file_leads_the_browser_to_the_page(scene: Scene, browser: Browser) -> None:
    """`grid open` passes a file to the browser, because other users can read the browser's command line."""
    client = scene.grid.client
    session = client.open_session()
    file = grid_page._redirect(scene.grid.home, client.url + session["path"], session["valid_s"])
    try:
        with opened(browser, file.as_uri()) as (page, seen):
            page.wait_for_url("**/ui/s/*/")
            assert page.url == f"{place_of(page)}/"
            assert seen.errors == []
    finally:
        file.unlink()
    assert not client.code_waits(session["name"])


def test_page_follows_a_running_job(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, f"/jobs/{scene.runs}") as (page, seen):
        ended = page.locator(".figure dd").first
        before = ended.inner_text()
        page.wait_for_function("before => document.querySelector('.figure dd').innerText !== before", arg=before)
        assert len([request for request in seen.requests if request.endswith(f"/jobs/{scene.runs}")]) == 1
        assert page.get_by_text("Remaining time").is_visible()
        assert page.locator("#content .why").inner_text()


def test_tasks_are_filtered_and_a_whole_row_is_a_link(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, f"/jobs/{scene.failed}") as (page, _):
        page.locator(".graph a").first.click()
        rows = page.locator("tbody tr")
        rows.first.wait_for()
        assert rows.count() == 8
        page.get_by_role("link", name=re.compile("^Failed")).click()
        page.wait_for_url("**state=failed*")
        assert rows.count() == 5
        assert set(page.locator("tbody .state").all_inner_texts()) == {"FAILED"}
        page.locator("#search").fill("parse/3")
        page.locator("#find").click()
        page.wait_for_url("**search=parse*")
        assert rows.count() == 1
        page.get_by_role("link", name="Clear").click()
        page.wait_for_url(lambda url: "search" not in url)
        # The cell at the other end of the row belongs to the link of the row, and the link is one Tab stop.
        box = rows.first.locator("td:visible").last.bounding_box()
        assert box
        page.mouse.click(box["x"] + box["width"] - 5, box["y"] + 5)
        page.wait_for_url("**/stages/parse/tasks/*")
        assert page.locator("h1").inner_text().startswith("Task parse/")
        page.go_back()
        rows.first.wait_for()
        page.locator("tbody a").first.focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('tr').rowIndex") == 2
        page.keyboard.press("Enter")
        page.wait_for_url("**/stages/parse/tasks/*")


def test_live_log_of_a_task_grows_and_ends(scene: Scene, browser: Browser) -> None:
    """The page of a running task shows new output, and becomes the page of the ended task without a reload."""
    folder = folder_of(scene.folder, "prints", 1)
    code = (folder / "handlers.py").read_text()
    printing = "    for line in range(12):\n        print('line', line, flush=True)\n        time.sleep(0.7)\n"
    (folder / "handlers.py").write_text(code.replace('    print("number", number)\n', printing))
    with ThreadPoolExecutor() as thread:  # playwright's event loop occupies this thread
        job = thread.submit(scene.grid.submit, folder / "job.yaml", "prints").result()["id"]
    scene.grid.wait(job, until=lambda view: view["stages"][0]["running"] > 0)
    with logged_in(scene, browser, f"/jobs/{job}/stages/parse/tasks/0") as (page, seen):
        page.get_by_role("heading", name="Live log").wait_for()
        page.wait_for_function("() => (document.querySelector('#log')?.textContent || '').includes('line 0')")
        page.evaluate("window.same = true")
        before = page.locator("#log").inner_text()
        page.wait_for_function("before => document.querySelector('#log').innerText.length > before", arg=len(before))
        page.locator("h1 .state", has_text="SUCCEEDED").wait_for()
        assert "line 11" in page.locator("#log").inner_text()
        assert page.get_by_text("Peak memory").is_visible()
        assert page.evaluate("window.same"), "the page was not loaded again"
        polls = len([request for request in seen.requests if "part=live" in request])
        page.wait_for_timeout(3_000)
        assert len([request for request in seen.requests if "part=live" in request]) == polls


def test_timeline_shows_workers_and_grows(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, f"/jobs/{scene.runs}/timeline") as (page, _):
        bars = page.locator("#plot .bar-succeeded")
        bars.first.wait_for(state="attached")
        count = bars.count()
        page.wait_for_function("count => document.querySelectorAll('#plot .bar-succeeded').length > count", arg=count)
        assert page.locator("#plot .bar-running").count() >= 1
        assert page.locator(".timeline-names text").count() == 2
        title = bars.first.locator("title").text_content() or ""
        assert re.fullmatch(r"parse/\d+, 1 task, [\d.]+ m?s from [\d.]+ m?s, succeeded", title)
        assert (page.locator("#plot").get_attribute("aria-label") or "").startswith("Timeline of ")


def test_report_opens_in_the_browser(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, f"/jobs/{scene.failed}") as (page, _):
        page.locator("#report").click()
        page.locator("#summary").wait_for()
        assert page.locator("h1").inner_text().startswith("fails")
        # The browser applies the style sheet of the report.
        assert page.evaluate("getComputedStyle(document.querySelector('.skip')).position") != "static"


def test_the_curves_are_drawn(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, "/grid") as (page, _):
        fleet = page.locator("#curve-fleet")
        fleet.locator("canvas").wait_for()
        assert re.search(r"Now: Desired \d+, In service \d+", fleet.get_attribute("aria-label") or "")
        page.locator("#theme").click()
        fleet.locator("canvas").wait_for()
        assert page.locator("#curve-queue canvas").count() == 1


def test_light_and_dark_are_remembered(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser) as (page, _):
        shade = page.locator("html")
        assert shade.get_attribute("data-bs-theme") == "light"
        page.locator("#theme").click()
        page.reload()
        assert shade.get_attribute("data-bs-theme") == "dark"


def test_page_reports_an_unreachable_manager_and_reconnects(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser) as (page, seen):
        page.route("**/*part=live*", lambda route: route.abort())
        page.locator("#away").wait_for(state="visible")
        page.unroute("**/*part=live*")
        page.locator("#away").wait_for(state="hidden")
        # These messages come from the browser and from htmx, not from the page.
        assert [error for error in seen.errors if not re.search("ERR_FAILED|^htmx:", error)] == []
        seen.errors.clear()


# --- Doing ---------------------------------------------------------------------------------------


def test_select_all_during_loading_selects_all(scene: Scene, browser: Browser) -> None:
    (group,) = [
        failure_group for failure_group in scene.grid.client.failure_groups(scene.failed) if failure_group["count"] == 3
    ]
    path = f"/jobs/{scene.failed}/failures/{group['fingerprint']}"
    held: list[Route] = []

    def slowly(route: Route) -> None:
        """Deliver the page up to its first row. The other rows and deferred requests wait for `held`."""
        answer = route.fetch()
        head, body, rows = answer.text().partition("<tbody>")
        first, end, others = rows.partition("</tr>")
        wait = '<script src="/ui/static/held.js"></script>'
        route.fulfill(response=answer, body=head + body + first + end + wait + others)

    with logged_in(scene, browser) as (page, _):
        page.route(f"**{path}", slowly)
        page.route("**/static/held.js", lambda route: held.append(route))
        page.goto(place_of(page) + path, wait_until="commit")
        boxes = page.locator('input[name="task"]')
        boxes.first.wait_for()
        page.get_by_label("Select all on this page").check()
        assert boxes.count() == 1
        assert boxes.first.is_checked()
        boxes.first.uncheck()
        held[0].fulfill(body="", content_type="text/javascript")
        page.wait_for_load_state("load")
        assert [box.is_checked() for box in boxes.all()] == [False, True, True]
        page.get_by_label("Select all on this page").uncheck()
        assert [box.is_checked() for box in boxes.all()] == [False] * 3


def test_failures_are_looked_at_and_some_of_them_run_again(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser) as (page, _):
        page.locator(f"#row-{scene.failed}").get_by_role("link", name="fails", exact=True).click()
        page.locator("#triage").click()
        groups = page.locator("article.group")
        groups.nth(1).wait_for()
        assert groups.count() == 2
        assert "<script>alert(2)</script>" in page.locator("main").inner_text()
        groups.nth(0).locator("summary").click()
        assert "ValueError" in groups.nth(0).locator("pre").inner_text()
        groups.nth(0).get_by_role("link", name="3 tasks").click()
        page.locator("tbody").get_by_role("link", name="parse/0", exact=True).click()
        assert page.locator("#log").inner_text().strip() == "number 1"
        assert page.locator("#input").inner_text().strip() == "1"
        page.get_by_role("link", name="Failures", exact=True).last.click()
        groups.nth(1).get_by_role("checkbox").check()
        page.locator("#retry-groups").click()
        page.wait_for_url(f"**/jobs/{scene.failed}")
        page.locator("h1 .state", has_text="FAILED").wait_for()
        view = scene.grid.wait(scene.failed)
        assert (view["round"], view["stages"][0]["failed"]) == (1, 5)
        page.locator("#triage").click()
        groups.nth(0).get_by_role("link", name="3 tasks").click()
        page.get_by_label("Select all on this page").check()
        assert page.locator('input[name="task"]:checked').count() == 3
        page.locator("#retry-tasks").click()
        page.wait_for_url(f"**/jobs/{scene.failed}")
        assert scene.grid.wait(scene.failed, until=lambda v: v["round"] == 2)


@pytest.mark.parametrize("has_script", [True, False], ids=["script", "no script"])
def test_user_corrects_the_input_of_a_failed_task(
    scene: Scene, browser: Browser, tmp_path: Path, has_script: bool
) -> None:
    """The page sends the file with and without JavaScript, and explains a file that is too large."""
    with ThreadPoolExecutor() as thread:  # playwright's event loop occupies this thread
        path = folder_of(tmp_path, "corrects", 3) / "job.yaml"
        job = thread.submit(partial(scene.grid.submit, path, f"corrects-{has_script}", bad="1")).result()["id"]
    scene.grid.wait(job)
    corrected, large = tmp_path / "corrected.txt", tmp_path / "large.txt"
    corrected.write_text("9\n")
    with large.open("wb") as file:
        file.truncate(18 * 1024**2)
    task = f"/jobs/{job}/stages/parse/tasks/0"
    if has_script:
        pages = logged_in(scene, browser, task)
    else:
        pages = opened(browser, f"{scene.grid.client.url}/ui/login", **DESKTOP, java_script_enabled=False)
    with pages as (page, seen):
        if not has_script:
            page.get_by_label("Token").fill(scene.grid.home.token())
            page.get_by_role("button", name="Log in").click()
            page.goto(f"{place_of(page)}{task}")
        page.locator("#new-input").set_input_files(large)
        page.locator("#retry-with-input").click()
        page.get_by_role("heading", name="The request failed").wait_for()
        assert page.locator("#problem").inner_text() == "The request is larger than the limit of 17 MiB."
        seen.errors.clear()  # the status of the answer is an error
        page.get_by_role("link", name="Back").click()
        page.locator("#new-input").set_input_files(corrected)
        page.locator("#retry-with-input").click()
        page.wait_for_url(f"**/jobs/{job}")
        view = scene.grid.wait(job)
        assert (view["state"], view["round"]) == ("SUCCEEDED", 1)
        page.goto(f"{place_of(page)}{task}")
        assert page.locator("#input").inner_text().strip() == "9"
        assert page.get_by_text("A retry gave the task a new input").is_visible()
        assert page.locator("#new-input").count() == 0


def test_user_submits_a_job_and_downloads_its_results(scene: Scene, browser: Browser, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "sent", 3)
    (folder / "data" / "numbers.txt").unlink()
    more = tmp_path / "more.txt"
    more.write_text("4\n5\n")
    with logged_in(scene, browser, "/submit") as (page, _):
        page.locator("#files").set_input_files(folder)
        page.locator("#data").set_input_files(more)
        page.get_by_text("More options").click()
        page.locator("#set1").fill("nap_s=0.01")
        page.locator("#send").click()
        page.wait_for_url("**/jobs/sent-*")
        page.locator("h1 .state", has_text="SUCCEEDED").wait_for()
        with page.expect_download() as coming:
            page.locator("#results").click()
        path = tmp_path / "results.zip"
        coming.value.save_as(path)
        with zipfile.ZipFile(path) as archive:
            (total,) = [name for name in archive.namelist() if name.endswith("total.jsonl")]
            assert archive.read(total) == b'{"task":0,"value":9}\n'


def test_invalid_job_file_is_reported_with_its_line(scene: Scene, browser: Browser, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "wrong", 1)
    (folder / "job.yaml").write_text("name: wrong\nstages: []\nimput: x\n")
    with logged_in(scene, browser, "/submit") as (page, seen):
        page.locator("#files").set_input_files(folder)
        page.locator("#send").click()
        page.get_by_role("heading", name="The request failed").wait_for()
        assert "job.yaml:3: " in page.locator("main").inner_text()
        page.get_by_role("link", name="Back").click()
        page.locator("#files").wait_for()
        seen.errors.clear()  # the status of the answer is an error


def test_a_job_is_paused_resumed_capped_and_cancelled(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, f"/jobs/{scene.runs}") as (page, _):
        state = page.locator("h1 .state")
        page.locator("#pause").click()
        state.get_by_text("PAUSED").wait_for()
        page.locator("#resume").click()
        page.locator("#pause").wait_for()
        page.locator("#cap").click()
        dialog = page.get_by_role("dialog", name="Cap on cost")
        dialog.get_by_role("textbox").fill("12.5")
        assert offences(page, "#dialog") == []
        dialog.get_by_role("button", name="Set").click()
        page.get_by_text("12.50 USD").first.wait_for()
        # A live update may arrive before the answer that closes the dialog.
        dialog.wait_for(state="hidden")
        page.locator("#cancel").click()
        dialog = page.get_by_role("dialog", name="Cancel runs?")
        dialog.get_by_role("link", name="Keep the job").click()
        assert dialog.count() == 0
        assert scene.grid.client.job(scene.runs)["ended_s"] is None
        page.locator("#cancel").click()
        dialog.get_by_role("button", name="Cancel the job").click()
        state.get_by_text("CANCELLED").wait_for()


def test_the_fleet_is_scaled_and_drained(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser, "/grid") as (page, _):
        page.get_by_role("link", name="Scale pool default").click()
        dialog = page.get_by_role("dialog", name="Scale pool default")
        dialog.get_by_label("Max").fill("3")
        dialog.get_by_role("spinbutton", name="Instances").fill("1")
        assert dialog.get_by_label("manually").is_checked()
        dialog.get_by_role("button", name="Scale").click()
        page.get_by_text("0 to 3").wait_for()
        pool = scene.grid.client.grid()["pools"][0]
        assert (pool["max"], pool["desired"], pool["held_by_hand"]) == (3, 1, True)
        page.locator("#drain").click()
        page.get_by_role("dialog").get_by_role("button", name="Drain").click()
        page.get_by_text("of 0 desired").wait_for()
        page.get_by_role("link", name="Scale pool default").click()
        dialog.get_by_label("The policy").check()
        dialog.get_by_role("button", name="Scale").click()
        page.wait_for_url("**/ui/s/*/grid")
        assert scene.grid.client.grid()["pools"][0]["held_by_hand"] is False


def test_logout_ends_the_session(scene: Scene, browser: Browser) -> None:
    with logged_in(scene, browser) as (page, seen):
        place = f"{place_of(page)}/"
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("heading", name="Log in").wait_for()
        page.go_back()
        page.get_by_role("heading", name="Log in").wait_for()
        page.get_by_label("Token").fill(scene.grid.home.token())
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="Jobs").wait_for()
        assert seen.requests.count(place) == 2, "the sign-in page does not try the place of the ended session"


def test_the_page_works_at_an_address_that_the_browser_does_not_trust(browser: Browser) -> None:
    """The address of a manager in a container uses http and is not the address of this machine. For such a page, the
    browser sends less information about the origin of forms."""
    with Rig() as rig:
        url = rig.url.replace("127.0.0.1", ELSEWHERE)
        path = rig.client.open_session()["path"]
        with opened(browser, url + path, **DESKTOP) as (page, _):
            page.wait_for_url(f"{url}/ui/s/*/")
            page.get_by_role("heading", name="Jobs").wait_for()
            page.get_by_role("button", name="Log out").click()
            page.get_by_label("Token").fill(TOKEN)
            page.get_by_role("button", name="Log in").click()
            page.wait_for_url(f"{url}/ui/s/*/")
            page.goto(f"{place_of(page)}/grid/pools/default")
            page.get_by_label("Max").fill("3")
            page.get_by_role("button", name="Scale").click()
            page.get_by_text("0 to 3").wait_for()
