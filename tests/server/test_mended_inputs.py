"""Retries with mended inputs over the HTTP API and the web page: kinds, refusals, audit records, later retries, and
rebuilds."""

from __future__ import annotations

import csv
import gc
import hashlib
import html
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from batchlab.core.errors import Refused, TooNew, UsageError
from batchlab.core.job_definition import InputDef, JobDef, SplitBy, StageDef
from batchlab.core.model import Bundle, JobId, Json, StageName
from batchlab.core.protocol import json_format, object_keys
from batchlab.core.protocol.bundle_inputs import Inputs
from batchlab.core.protocol.mended_inputs import MAX_INPUT_BYTES, mended_input
from batchlab.core.protocol.messages import TaskMessage, read_task_message, task_message
from batchlab.core.retry_rule import RetryRule
from batchlab.manager.audit_log import AuditFilter
from batchlab.manager.retry_rounds import read_retry
from batchlab.server.http import job_files
from tests.support.server.api import MAP, Rig, job
from tests.support.server.page import OURS, Visitor
from tests.support.server.users import add

NEXT = StageName("next")
NEW = b"corrected"
WRONG_JSON = {
    b"{": "is not JSON: expecting property name enclosed in double quotes at line 1, column 2.",
    b'{\n  "n": twelve\n}': "is not JSON: expecting value at line 2, column 8.",
    b'"twelve': "is not JSON: unterminated string starting at line 1, column 1.",
    b'["a\tb"]': "is not JSON: invalid control character at line 1, column 4.",
    b"\xff": "is not JSON: it is not UTF-8 text.",
    b'"\\ud800"': "is text that UTF-8 cannot represent",
    b"[" * 100_000: "is not JSON: it is nested too deeply.",
    b" \n": "is not JSON: it is empty.",
    b"": "is not JSON: it is empty.",
    b"[]," * 1_300_000: "has too many JSON arrays and objects.",
    b"NaN": "is the number nan, which JSON does not have",
}


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


def ended(rig: Rig, made: JobDef, *, bad: set[int], bundles: int) -> str:
    name = rig.submit(made)
    rig.work(name, bundles, bad=bad)
    assert rig.ended(name)["state"] == "FAILED"
    return name


def dump_of(rig: Rig) -> Any:
    ledger: Any = rig.ledger
    return rig.run(ledger.dump())


def bundle_of(rig: Rig, name: str, stage: StageName, task: int) -> Bundle:
    """Return the outstanding bundle of a task, which the manager may still have to cut."""

    def look() -> list[Bundle]:
        bundles = [one.bundle for one in rig.manager.lives[JobId(name)].all_outstanding()]
        return [bundle for bundle in bundles if bundle.stage == stage and task in bundle.tasks]

    (found,) = rig.until(look, f"the bundle of {stage}/{task}")
    return found


def item_of(rig: Rig, name: str, stage: StageName, task: int) -> Json:
    """Return the input of an outstanding task, as a worker reads it."""
    bundle, live = bundle_of(rig, name, stage, task), rig.manager.lives[JobId(name)]

    async def read() -> Json:
        ports = rig.manager.ports
        items = await Inputs(ports.objects, ports.patience).resolve(live.job, bundle, await ports.keys.key_of(live.job))
        return dict(zip(bundle.tasks, items, strict=True))[task]

    return rig.run(read())


def with_items(token: str, size: int = 1) -> JobDef:
    made = job(token=token, tasks=1)
    return replace(made, input=InputDef((f"{object_keys.raw(made.id)}items",), SplitBy.ITEMS, size))


def submit_items(rig: Rig, made: JobDef, lines: str) -> str:
    assert made.input
    rig.run(rig.objects.put(made.input.keys[0], lines.encode()))
    return rig.client.submit(made)["id"]


def test_a_file_is_replaced_under_its_name_and_the_record_names_its_hash(rig: Rig) -> None:
    name = ended(rig, job(token="file"), bad={1, 2}, bundles=4)
    view = rig.client.retry(name, inputs={("map", 1): NEW})
    assert view["round"] == 1
    bundle = bundle_of(rig, name, MAP, 1)
    mended, sha256 = mended_input(bundle), hashlib.sha256(NEW).hexdigest()
    assert mended
    assert (mended.sha256, mended.size) == (sha256, len(NEW))
    item = item_of(rig, name, MAP, 1)
    assert item == {"$file": object_keys.mended_file(JobId(name), MAP, sha256), "name": "1", "size": len(NEW)}
    assert rig.run(rig.objects.get(item["$file"])) == NEW
    rig.work(name, 1)
    assert rig.ended(name)["stages"][0]["failed"] == 1
    records, _ = rig.run(rig.audit.page(AuditFilter(action="job retry"), 10))
    (record,) = records
    assert record.reason == f"map/1: new input of 9 bytes, SHA-256 {sha256}"


def test_views_of_tasks_name_the_hash(rig: Rig) -> None:
    name = ended(rig, job(token="views"), bad={1, 2}, bundles=4)
    rig.client.retry(name, inputs={("map", 1): NEW})
    sha256 = hashlib.sha256(NEW).hexdigest()
    assert "Also, 1 task has a mended input from a retry." in rig.client.why(name)

    def get(path: str) -> Any:
        headers = {"Authorization": "Bearer correct horse"}
        return rig.http.get(f"/v1/jobs/{name}{path}", headers=headers).json()

    waiting = get("/stages/map/tasks/1")
    assert (waiting["input"], waiting["input_of"]) == ("corrected", "1, 9 bytes")
    assert waiting["mended_sha256"] == sha256
    rig.work(name, 1)
    rig.ended(name)
    assert [one["mended_sha256"] for one in get("/tasks")["tasks"]] == ["", sha256, "", ""]
    listed = rig.http.get(f"/v1/jobs/{name}/tasks.csv", headers={"Authorization": "Bearer correct horse"}).text
    assert [row["mended_sha256"] for row in csv.DictReader(listed.splitlines())] == ["", sha256, "", ""]
    assert get("/stages/map/tasks/1")["mended_sha256"] == sha256
    assert get("/stages/map/tasks/2")["mended_sha256"] == ""


def test_later_retries_keep_the_input_until_it_is_replaced(rig: Rig) -> None:
    name = ended(rig, job(token="later"), bad={0, 1}, bundles=4)
    rig.client.retry(name, inputs={("map", 1): NEW})
    rig.work(name, 1, bad={1})
    rig.ended(name)
    # The task fails again, and is not selected once.
    rig.client.retry(name, tasks={"map": [(0, 1)]})
    rig.work(name, 1, bad={0})
    rig.ended(name)
    rig.client.retry(name)
    assert item_of(rig, name, MAP, 1)["size"] == len(NEW)
    assert bundle_of(rig, name, MAP, 0).source is None
    rig.work(name, 2, bad={1})
    rig.ended(name)
    rig.client.retry(name, inputs={("map", 1): b"better"})
    assert item_of(rig, name, MAP, 1)["size"] == len(b"better")
    rig.work(name, 1)
    assert rig.ended(name)["state"] == "SUCCEEDED"


def test_a_rebuilt_ledger_keeps_the_input(rig: Rig) -> None:
    name = ended(rig, job(token="rebuilt"), bad={0, 1}, bundles=4)
    rig.client.retry(name, inputs={("map", 1): NEW})
    rig.work(name, 1, bad={1})
    before = rig.ended(name)
    dump = dump_of(rig)
    rig.client.rebuild()
    assert rig.client.job(name) == before
    assert dump_of(rig) == dump
    rig.client.retry(name, tasks={"map": [(1, 2)]})
    assert item_of(rig, name, MAP, 1)["size"] == len(NEW)


def test_json_items_are_checked_and_large_ones_are_stored_apart(rig: Rig) -> None:
    made = with_items("items")
    name = submit_items(rig, made, '{"n": 1}\n{"n": 2}\n')
    rig.work(name, 2, bad={0, 1})
    rig.ended(name)
    for wrong, reason in WRONG_JSON.items():
        with pytest.raises(UsageError, match=f"^The (new )?input of task map/1 {re.escape(reason)}"):
            rig.client.retry(name, inputs={("map", 1): wrong})
    large = json.dumps({"text": "x" * 200_000}).encode()
    rig.client.retry(name, inputs={("map", 1): BOM_UTF8 + b' {"$n": 3} ', ("map", 0): large})
    assert item_of(rig, name, MAP, 1) == {"$$n": 3}
    assert item_of(rig, name, MAP, 0)["$value"].startswith(f"jobs/{name}/map/plan/mended/")


def test_an_item_of_several_lines_is_an_array(rig: Rig) -> None:
    made = with_items("arrays", size=2)
    name = submit_items(rig, made, "1\n2\n3\n")
    rig.work(name, 2, bad={0, 1})
    rig.ended(name)
    with pytest.raises(UsageError, match="is not a JSON array"):
        rig.client.retry(name, inputs={("map", 1): b"5"})
    rig.client.retry(name, inputs={("map", 1): b"[5, 6]"})
    assert item_of(rig, name, MAP, 1) == [5, 6]


def test_a_task_of_a_later_stage_gets_a_value(rig: Rig) -> None:
    made = job(
        token="chain",
        tasks=2,
        after=[StageDef(NEXT, after=(MAP,), handler="m:f", bundle=1, retry=RetryRule(attempts=1))],
    )
    name = rig.submit(made)
    rig.work(name, 2)
    rig.work(name, 2, bad={0, 1})
    rig.ended(name)
    with pytest.raises(UsageError, match="is not JSON"):
        rig.client.retry(name, inputs={("next", 1): NEW})
    rig.client.retry(name, inputs={("next", 1): b"77"}, tasks={"next": [(0, 1)]})
    assert item_of(rig, name, NEXT, 1) == 77
    assert item_of(rig, name, NEXT, 0) == 0


def test_a_gathering_task_gets_a_value_unless_it_is_planned_again(rig: Rig) -> None:
    total = StageDef(NEXT, after=(MAP,), gather="*", handler="m:f", bundle=1, retry=RetryRule(attempts=1))
    name = rig.submit(replace(job(token="gather", tasks=2, after=[total]), max_failures=1))
    rig.work(name, 2, bad={1})
    rig.work(name, 1, bad={0})
    rig.ended(name)
    with pytest.raises(Refused, match=r"Task next/0 .* cannot have a new input, because this retry plans stage next"):
        rig.client.retry(name, inputs={("next", 0): b"[1]"}, tasks={"map": [(1, 2)]})
    rig.client.retry(name, inputs={("next", 0): b"[1]"})
    assert item_of(rig, name, NEXT, 0) == [1]


def test_refusals_are_one_sentence(rig: Rig) -> None:
    name = rig.submit(job(token="refused"))
    with pytest.raises(Refused, match="is still"):
        rig.client.retry(name, inputs={("map", 1): NEW})
    rig.work(name, 4, bad={0})
    rig.ended(name)
    retry = partial(rig.client.retry, name)
    wrong: Mapping[tuple[str, int], str] = {
        ("map", 1): "Task map/1 of job .* has not failed",
        ("map", 9): "does not have a task map/9",
        ("nowhere", 0): "does not have a stage nowhere",
    }
    for task, text in wrong.items():
        with pytest.raises(Refused, match=text):
            retry(inputs={task: NEW})
    with pytest.raises(UsageError, match=r"input of task map/0 has 16.0 MiB, and the limit of a new input is 16.0 MiB"):
        retry(inputs={("map", 0): b"x" * (MAX_INPUT_BYTES + 1)})
    assert rig.client.job(name)["round"] == 0


def test_a_retry_of_another_request_is_not_reported_as_this_one(rig: Rig) -> None:
    name = ended(rig, job(token="rivals"), bad={1}, bundles=4)
    planner, record = rig.manager.job_commands._retries, rig.run(rig.ledger.job(JobId(name)))
    other = rig.run(planner.plan(record, None, {}))
    rig.run(rig.objects.put(object_keys.retry(JobId(name), 1), other.to_bytes()))
    with pytest.raises(Refused, match=r"Another retry of job .* began first"):
        rig.client.retry(name, inputs={("map", 1): NEW})
    assert bundle_of(rig, name, MAP, 1).source is None
    assert rig.client.job(name)["round"] == 1


def test_the_record_of_a_failed_retry_has_the_hash_of_its_input(rig: Rig) -> None:
    name = ended(rig, job(token="failed"), bad={1}, bundles=4)
    for task, data in ((0, NEW), (1, b"x" * (MAX_INPUT_BYTES + 1))):
        with pytest.raises((Refused, UsageError)):
            rig.client.retry(name, inputs={("map", task): data})
        record, *_ = rig.client.audit(action="job retry")
        asked = f"map/{task}: new input of {len(data)} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"
        assert record["outcome"] == "failed"
        assert record["reason"].startswith(("409: ", "422: "))
        assert record["reason"].endswith(f"; {asked}")


def test_a_retry_has_one_object_for_all_its_records(rig: Rig) -> None:
    name = ended(rig, job(token="many"), bad={0, 1, 2}, bundles=4)
    rig.client.audit()
    before = len(audit_objects(rig))
    rig.client.retry(name, inputs={("map", task): NEW for task in (0, 1, 2)})
    assert [one["outcome"] for one in rig.client.audit(action="job retry")] == ["done"] * 3
    assert len(audit_objects(rig)) == before + 2


def audit_objects(rig: Rig) -> list[str]:
    async def names() -> list[str]:
        return [info.key async for page in rig.objects.list(object_keys.AUDIT) for info in page]

    return rig.run(names())


def test_a_deleted_job_leaves_no_input(rig: Rig) -> None:
    name = ended(rig, job(token="deleted"), bad={1}, bundles=4)
    rig.client.retry(name, inputs={("map", 1): NEW})
    rig.work(name, 1, bad={1})
    rig.ended(name)
    rig.client.delete(name)

    async def left() -> list[Any]:
        return [info.key async for page in rig.objects.list(f"jobs/{name}/map/plan/mended/") for info in page]

    assert not rig.run(left())


def test_messages_and_retries_have_a_format_that_earlier_releases_refuse(rig: Rig) -> None:
    name = ended(rig, job(token="formats"), bad={0, 1}, bundles=4)
    rig.client.retry(name, inputs={("map", 1): NEW})
    bundle = bundle_of(rig, name, MAP, 1)
    body = task_message(TaskMessage(bundle))
    assert read_task_message(body).bundle == bundle
    stored = rig.run(rig.objects.get(object_keys.retry(JobId(name), 1)))
    for text in (body, stored):
        with pytest.raises(TooNew, match="in format 2"):
            json_format.loads(text)
    assert rig.run(read_retry(rig.manager.ports, rig.manager.lives[JobId(name)].job, 1)).mended()
    rig.work(name, 1)
    rig.ended(name)
    rig.client.retry(name)
    assert json_format.loads(rig.run(rig.objects.get(object_keys.retry(JobId(name), 2))))["v"] == 1


# --- The web page ----------------------------------------------------------------------------------

FORM = 'id="correct"'


@pytest.fixture
def visitor(rig: Rig) -> Iterator[Visitor]:
    made = Visitor(rig)
    with made.http:
        assert made.log_in().status_code == 303
        yield made


def upload(visitor: Visitor, name: str, *files: tuple[str, bytes], **fields: Any) -> httpx.Response:
    """Send the form of the page of a failed task as a browser sends it."""
    fields = {"form_token": visitor.token(), "task": "map/1", **fields}
    parts = [("input", file) for file in files]
    return visitor.http.post(f"{visitor.root}/jobs/{name}/retry", data=fields, files=parts, headers=OURS)


def test_the_page_of_a_failed_task_sends_a_corrected_file(rig: Rig) -> None:
    name = ended(rig, job(token="page"), bad={1, 2}, bundles=4)
    visitor = Visitor(rig)
    with visitor.http:
        visitor.log_in(add(rig, "olga", "operate"))
        page = visitor.get(f"/jobs/{name}/stages/map/tasks/1").text
        assert FORM in page
        assert 'enctype="multipart/form-data"' in page
        assert FORM not in visitor.get(f"/jobs/{name}/stages/map/tasks/0").text
        answer = upload(visitor, name, ("../../any name.txt", NEW))
        assert (answer.status_code, answer.headers["location"]) == (303, f"{visitor.root}/jobs/{name}")
        assert FORM not in visitor.get(f"/jobs/{name}/stages/map/tasks/1").text
    sha256 = hashlib.sha256(NEW).hexdigest()
    assert item_of(rig, name, MAP, 1) == {
        "$file": object_keys.mended_file(JobId(name), MAP, sha256),
        "name": "1",
        "size": len(NEW),
    }
    (record,) = rig.client.audit(action="job retry")
    assert (record["user"], record["object"], record["outcome"]) == ("olga", name, "done")
    assert record["reason"] == f"map/1: new input of 9 bytes, SHA-256 {sha256}"
    rig.work(name, 1)
    view = rig.ended(name)
    assert (view["round"], view["stages"][0]["failed"]) == (1, 1)


def test_the_page_shows_the_form_to_users_who_may_retry(rig: Rig) -> None:
    name = ended(rig, job(token="roles"), bad={1}, bundles=4)
    for user, role, shows in (("vera", "view", False), ("sam", "submit", False), ("olga", "operate", True)):
        visitor = Visitor(rig)
        with visitor.http:
            visitor.log_in(add(rig, user, role))
            assert (FORM in visitor.get(f"/jobs/{name}/stages/map/tasks/1").text) is shows
            if not shows:
                answer = upload(visitor, name, ("new.txt", NEW))
                assert answer.status_code == 403
                assert f"The user {user} with the role {role} may not do" in answer.text
    assert rig.client.job(name)["round"] == 0


def test_the_page_refuses_a_wrong_file_in_one_sentence(
    rig: Rig, visitor: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_files, "disk_folder", lambda: str(tmp_path))
    made = with_items("wrong")
    name = submit_items(rig, made, '{"n": 1}\n{"n": 2}\n')
    rig.work(name, 2, bad={1})
    rig.ended(name)
    assert "one JSON value" in visitor.get(f"/jobs/{name}/stages/map/tasks/1").text
    file, large = ("new.txt", b"5"), b"x" * (MAX_INPUT_BYTES + 1)
    refusals: list[tuple[list[tuple[str, bytes]], dict[str, Any], str]] = [
        ([("new.json", b'{"n": }')], {}, "is not JSON: expecting value at line 1, column 7."),
        ([("new.json", b"")], {}, "is not JSON: it is empty."),
        ([("", b"")], {}, "No file with the new input is selected."),
        ([], {"input": "5"}, "No file with the new input is selected."),
        ([file, file], {}, "Too many files."),
        ([file], {"task": "map/0"}, "Task map/0 of job"),
        ([file], {"task": "1"}, "A new input is for one task of a stage."),
        ([file], {"task": ["map/1", "map/0"]}, "A new input is for one task of a stage."),
        ([file], {"task": "map/1,0"}, "is not the name of a task."),
        ([("new.json", large)], {}, "the limit of a new input is 16.0 MiB."),
        ([("new.json", large * 2)], {}, "The request is larger than the limit of 17 MiB."),
        ([file], {"form_token": ""}, "The form belongs to another session."),
    ]
    for files, fields, text in refusals:
        answer = upload(visitor, name, *files, **fields)
        assert answer.status_code in (400, 409, 422), text
        assert text in html.unescape(answer.text)
        assert "text/html" in answer.headers["content-type"]
        gc.collect()
        assert list(tmp_path.iterdir()) == [], f"{text} leaves the file on the disk"
    assert rig.client.job(name)["round"] == 0
    assert upload(visitor, name, file).status_code == 303
    assert item_of(rig, name, MAP, 1) == 5


def test_the_page_reads_an_upload_of_known_length_only(rig: Rig, visitor: Visitor) -> None:
    name = ended(rig, job(token="length"), bad={1}, bundles=4)

    def chunks() -> Iterator[bytes]:
        yield b"--x\r\n"

    headers = {**OURS, "Content-Type": "multipart/form-data; boundary=x"}
    answer = visitor.http.post(f"{visitor.root}/jobs/{name}/retry", content=chunks(), headers=headers)
    assert answer.status_code == 422
    assert "does not have a valid Content-Length" in answer.text
