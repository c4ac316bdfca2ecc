"""The pages of tasks, of the timeline, and of the report, with hostile names of input files and logs."""

from __future__ import annotations

import asyncio
import html
import re
from pathlib import Path

import pytest

from batchlab.core.commit import commit
from batchlab.core.job_definition import StageDef
from batchlab.core.model import JobId, Ran, StageName, TaskMetrics
from batchlab.core.protocol import object_keys, settlement
from batchlab.core.protocol.messages import Events, Tail, to_bytes
from batchlab.manager.state import Outstanding
from batchlab.server.report_writer import HtmlReports
from batchlab.server.web.rendering import STOP_POLLING
from batchlab.server.web.security import HEADERS
from tests.support.server.api import Rig, job
from tests.support.server.page import NASTY, Visitor, rig, visitor

__all__ = ["rig", "visitor"]

FILE = f"{NASTY}\u202e"
"""A hostile name of an input file, whose last character would change the direction of the text that follows."""


async def done(rig: Rig, one: Outstanding, worker: str = "w-1") -> None:
    live = rig.manager.lives[JobId(one.bundle.job)]
    ran = [Ran(task, 0.5, task, None, TaskMetrics(0.25, 3_000_000, 40, 5, FILE)) for task in one.bundle.tasks]
    outcome = settlement.settle(
        job=live.job, bundle=one.bundle, ran=ran, execution="x", worker=worker, started_s=0.0, ended_s=9e9
    )
    await commit(rig.objects, outcome, rig.manager.ports.patience, await rig.manager.ports.keys.key_of(live.job))
    await rig.tell(Events(completions=(settlement.completion(outcome),)))


def test_hostile_names_of_input_files_stay_text(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="nasty-rows", tasks=2))
    for one in rig.outstanding(name, 2):
        rig.run(done(rig, one))
    rig.ended(name)
    for path in ("tasks", f"tasks?search={NASTY}", f"tasks?stage={NASTY}", "timeline", "stages/map/tasks/0"):
        answer = visitor.get(f"/jobs/{name}/{path}")
        assert answer.status_code == 200
        assert "<script>alert" not in answer.text, path
        assert "<img src=x" not in answer.text, path
        assert "\u202e" not in answer.text, path
        assert len(answer.text) < 20_000
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in visitor.get(f"/jobs/{name}/tasks").text
    bars = re.findall(
        r'<rect class="bar-succeeded" x="([-\d.]+)%" y="[\d.]+" width="([\d.]+)%"', _timeline(visitor, name)
    )
    assert [(float(x), float(width)) for x, width in bars] == [(0.0, 100.0)] * 2


def test_lists_and_logs_are_downloads(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="downloads", tasks=2))
    rig.work_on(name, 2, [0])
    for page, link in (("tasks?state=succeeded", "csv"), ("stages/map/tasks/0", "whole-log")):
        found = re.search(
            rf'id="{link}" href="{visitor.root}([^"]+)" download', visitor.get(f"/jobs/{name}/{page}").text
        )
        assert found, page
        answer = visitor.get(html.unescape(found[1]))
        assert answer.status_code == 200
        assert answer.headers["Content-Disposition"].startswith("attachment")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert len(answer.text.splitlines()) == {"csv": 2, "whole-log": 1}[link]
    assert "whole-log" not in visitor.get(f"/jobs/{name}/stages/map/tasks/1").text


def _timeline(visitor: Visitor, name: str) -> str:
    return visitor.get(f"/jobs/{name}/timeline").text


def test_tasks_are_filtered_and_paged_by_links(rig: Rig, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.web.views.TASKS_PER_PAGE", 2)
    total = StageDef(StageName("total"), handler="m:g", after=(StageName("map"),), gather="*")
    name = rig.submit(job(token="paged", tasks=5, after=[total]))
    rig.work_on(name, 5, [0, 1, 3], bad=[1])

    def rows(path: str) -> list[str]:
        return re.findall(r'<a class="cover" href="[^"]+">(\w+/\d+)</a>', visitor.get(path).text)

    here = f"/jobs/{name}/tasks"
    assert rows(here) == ["map/0", "map/1"]
    found = re.search(rf'href="{visitor.root}({here}\?[^"]+)">Next page', visitor.get(here).text)
    assert found
    assert rows(found[1]) == ["map/2", "map/3"]
    assert ">First page<" in visitor.get(found[1]).text
    assert rows(f"{here}?state=failed") == ["map/1"]
    assert rows(f"{here}?state=waiting&stage=map") == ["map/2", "map/4"]
    assert rows(f"{here}?search=3") == ["map/3"]
    assert "No task matches." in visitor.get(f"{here}?state=running").text
    tabs = re.findall(
        r'tasks(?:\?[^"]*)?"(?: aria-current="true")?>(\w+) <span class="many">(\d+)', visitor.get(here).text
    )
    assert dict(tabs) == {
        "All": "5", "Waiting": "2", "Running": "0", "Succeeded": "2", "Failed": "1", "Canceled": "0"
    }  # fmt: skip
    assert visitor.get(f"{here}?state=lost").status_code == 422
    page = visitor.get(f"/jobs/{name}").text
    assert f'href="{visitor.root}{here}?stage=map"' in page
    assert "Graph of 2 stages: total after map" in page


def test_page_of_a_running_task_follows_it_to_its_end(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="follow", tasks=1))
    (one,) = rig.outstanding(name, 1)
    here = f"/jobs/{name}/stages/map/tasks/0"
    assert "The task waits for a worker" in visitor.get(here).text
    worker = rig.beat(rig.instance(), one).worker
    tail = Tail("map", 0, 1, 0, one.bundle.id, "x", 0, 9, f"{NASTY}\n")
    rig.run(rig.objects.put(object_keys.tail(JobId(name), worker), to_bytes([tail])))
    text = rig.until(lambda: page if "data-follow>" in (page := visitor.get(here).text) else "", "the log")
    assert "Live log" in text
    assert f"<code>{worker}</code>" in text
    assert "<script>alert" not in text
    assert ">data</pre>" in text
    found = re.search(r'hx-get="([^"]+)"', text)
    assert found
    update = html.unescape(found[1])
    part = visitor.http.get(update, headers={"HX-Request": "true"})
    assert (part.status_code, ">data</pre>" in part.text) == (200, False)
    rig.work(name, 1)
    rig.ended(name)
    last = visitor.http.get(update, headers={"HX-Request": "true"})
    assert last.status_code == STOP_POLLING
    assert "task 0, try 1" in last.text
    assert "Peak memory" in last.text
    assert "hx-get" not in visitor.get(here).text


def test_the_report_is_written_once_for_an_ended_job(tmp_path: Path) -> None:
    with Rig(reports=tmp_path) as made:
        visitor = Visitor(made)
        visitor.http.timeout = 60.0  # the first report loads DuckDB
        with visitor.http:
            visitor.log_in()
            name = made.submit(job(token="report", tasks=2))
            path = f"/jobs/{name}/report.html"
            assert visitor.get(path).status_code == 409
            made.work(name, 2, bad=[1])
            made.ended(name)
            assert f'href="{visitor.root}{path}"' in visitor.get(f"/jobs/{name}").text
            first = visitor.get(path)
            assert first.status_code == 200, first.text
            assert "sums" in first.text
            policy = first.headers["Content-Security-Policy"]
            assert "script-src" not in policy
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert first.headers["X-Content-Type-Options"] == HEADERS["X-Content-Type-Options"]
            assert visitor.get(path).content == first.content
            assert [one.name for one in tmp_path.iterdir()] == []
            assert visitor.get("/jobs/nowhere/report.html").status_code == 404


def test_reports_are_written_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchlab.server.answers.BUSY_WAIT_S", 0.01)
    begun, going = asyncio.Event(), asyncio.Event()
    reports = HtmlReports(None, None, tmp_path)  # type: ignore[arg-type]

    async def write(job: JobId) -> bytes:
        begun.set()
        await going.wait()
        return job.encode()

    monkeypatch.setattr(reports, "_write", write)

    async def both() -> None:
        first = asyncio.create_task(reports.page(JobId("a"), 0))
        await begun.wait()
        with pytest.raises(Exception, match="writes another report"):
            await reports.page(JobId("b"), 0)
        going.set()
        assert await first == b"a"
        assert [await reports.page(JobId(name), 0) for name in "abcdefg"] == [name.encode() for name in "abcdefg"]
        assert len(reports._pages) == 4

    asyncio.run(both())


def test_pages_without_reports_say_so(rig: Rig, visitor: Visitor) -> None:
    name = rig.submit(job(token="none", tasks=1))
    rig.work(name, 1)
    rig.ended(name)
    answer = visitor.get(f"/jobs/{name}/report.html")
    assert answer.status_code == 409
    assert "does not write reports" in answer.text
