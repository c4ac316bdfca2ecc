"""Odd values in requests of the HTTP API, which are refused with an error message or are harmless."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from batchlab.core.job_definition import InputDef
from batchlab.core.protocol import json_format
from tests.support.server.api import TOKEN, Rig, get, job

ODD = (
    '"\\ud800"',
    '"\\u0000"',
    '"../../x"',
    '"\\u001b[31m"',
    f'"{"x" * 20_000}"',
    "1e18",
    "-1",
    "1e999",
    "NaN",
    "-Infinity",
    "1" * 40,
    "9" * 5000,
    "0.5",
    "null",
    "true",
    "[]",
    "{}",
    '{"$pickle":"gASVBAAAAAAAAABLAS4="}',
    "[" * 5000 + "]" * 5000,
)
"""JSON texts that replace a value. Some of these texts are not valid JSON."""
HOLE = '"@hole@"'


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def places(doc: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a document, except the path of the document itself."""
    pairs = doc.items() if isinstance(doc, dict) else enumerate(doc)
    for key, value in pairs:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def with_hole(doc: Any, at: tuple[Any, ...]) -> str:
    """Return the document as text, with HOLE in place of one value."""
    made = json.loads(json.dumps(doc))
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = json.loads(HOLE)
    return json.dumps({"job": made})


def post(rig: Rig, text: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    return rig.http.post("/v1/jobs", content=text, headers=headers)


def document(token: str) -> Any:
    made = job("odd", token, tasks=1)
    return json.loads(json.dumps(json_format.job_to_json(made)))


def test_no_value_of_a_job_fails_the_manager_or_a_listing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """The test replaces every value of a job by every odd value, and no answer may be an internal error."""
    accepted = 0
    for number, at in enumerate(places(document("t"))):
        for odd in ODD:
            doc = document(f"{number}-{odd[:40]}")
            found = post(rig, with_hole(doc, at).replace(HOLE, odd))
            assert found.status_code < 500, (at, odd[:40], found.text)
            accepted += found.status_code == 201
    assert accepted > 10
    listed = get(rig, "/v1/jobs?limit=1000")
    assert listed.status_code == 200
    for one in listed.json()["jobs"]:
        for part in ("", "/why", "/eta", "/outcomes", "/failures", "/logs", "/use"):
            found = get(rig, f"/v1/jobs/{one['id']}{part}")
            assert found.status_code < 500, (one["id"], part, found.text)
    assert get(rig, "/metrics").status_code == 200
    assert rig.manager.is_leader.is_set()
    assert "met a bug" not in caplog.text


@pytest.mark.parametrize("odd", ["1e18", "-1", "1e999", "NaN", "1" * 40])
@pytest.mark.parametrize(
    "at",
    [
        ("submitted_s",),
        ("start_at_s",),
        ("max_failures",),
        ("stages", 0, "timeout_s"),
        ("stages", 0, "retry", "backoff_s"),
        ("stages", 0, "retry", "factor"),
    ],
)
def test_a_number_beyond_all_clocks_is_refused_with_a_sentence(rig: Rig, at: tuple[Any, ...], odd: str) -> None:
    found = post(rig, with_hole(document("numbers"), at).replace(HOLE, odd))
    assert found.status_code == 422, found.text
    assert "leave it out" in found.json()["remedy"] or "not valid at" in found.json()["error"]


@pytest.mark.parametrize("odd", ["NaN", "Infinity", '"\\ud800"'])
def test_an_item_that_json_does_not_know_is_refused(rig: Rig, odd: str) -> None:
    doc = {**document("items"), "input": None, "items": 1}
    text = json.dumps({"job": doc, "items": ["@hole@"]}).replace(HOLE, odd)
    found = post(rig, text)
    assert found.status_code == 422, found.text
    error = found.json()["error"]
    assert "that JSON cannot represent" in error or "a number that is not finite" in error


def test_an_error_does_not_repeat_a_request_without_end(rig: Rig) -> None:
    found = post(rig, json.dumps({"job": {**document("long"), "name": "x" * 1_000_000}}))
    assert found.status_code == 422
    assert len(found.content) < 20_000


def test_odd_numbers_of_an_input_are_refused(rig: Rig) -> None:
    for size in (0, -1, 2**60):
        doc = json_format.job_to_json(job("input", "t"))
        doc["input"] = json_format.fields(InputDef(("raw/x",), size=size))
        assert post(rig, json.dumps({"job": doc})).status_code == 422


@pytest.mark.parametrize(
    "key", ["../../x", "raw//x", "raw/\x00", "raw/\x1b[2J", "/", "", "grid/notifications.json", "grid/"]
)
def test_input_that_no_bucket_holds_or_that_is_the_grids_is_refused(rig: Rig, key: str) -> None:
    """A job with such an input would never end, or would read objects that only the manager may read."""
    doc = json_format.job_to_json(job("input", "t"))
    doc["input"] = json_format.fields(InputDef((key,)))
    found = post(rig, json.dumps({"job": doc}))
    assert found.status_code == 422, found.text
    assert "The input names" in found.json()["error"]


@pytest.mark.parametrize("names", [("map", "Map"), ("map", "map"), ("spec.json",), ("Control.json",)])
def test_stages_with_the_same_folder_are_refused(rig: Rig, names: tuple[str, ...]) -> None:
    """On a file system that ignores case, two names may share a folder. A file of the job may also have the name of a
    stage's folder."""
    stages = [{**document("t")["stages"][0], "name": name} for name in names]
    found = post(rig, json.dumps({"job": {**document("stages"), "stages": stages}}))
    assert found.status_code == 422, found.text
    assert "named" in found.json()["error"] or "cannot name a stage" in found.json()["error"]


PATHS = ("%ED%A0%80", "..%2F..%2Fx", "%00", "x" * 8000, "%1b[31m", "a%0d%0ab")


@pytest.mark.parametrize("path", PATHS)
def test_no_name_in_a_path_fails_the_manager(rig: Rig, path: str) -> None:
    for at in ("jobs", "schedules"):
        for part in ("", "/why", "/next", "/logs", "/stages/x/tasks/1"):
            found = get(rig, f"/v1/{at}/{path}{part}")
            assert 400 <= found.status_code < 500, (at, part, found.text)
    assert get(rig, f"/v1/jobs?before={path}").status_code < 500


@pytest.mark.parametrize("value", ["NaN", "1e999", "-1", "9" * 400, "%ED%A0%80", "true"])
def test_no_query_fails_the_manager(rig: Rig, value: str) -> None:
    known = rig.submit(job("queried", "t"))
    queries = {
        "/v1/jobs": ("limit", "before", "active"),
        f"/v1/jobs/{known}": ("version",),
        f"/v1/jobs/{known}/outcomes": ("after", "limit"),
        f"/v1/jobs/{known}/logs": ("task", "stage", "limit", "since_s", "failed"),
        f"/v1/jobs/{known}/logs/after": ("seq",),
        f"/v1/jobs/{known}/failures": ("after", "limit", "fingerprint"),
        f"/v1/jobs/{known}/stages/map/tasks/{value}": ("seq",),
        "/v1/grid/activities": ("limit", "pool"),
    }
    for path, names in queries.items():
        for name in names:
            found = get(rig, f"{path}?{name}={value}")
            assert found.status_code < 500, (path, name, found.text)


def test_job_id_that_differs_only_in_case_is_refused(rig: Rig) -> None:
    """On a disk that ignores case, the two jobs would share their objects."""
    known = rig.submit(job("victim", "case"))
    doc = json_format.job_to_json(job("victim", "case"))
    refused = post(rig, json.dumps({"job": {**doc, "id": known.upper()}}))
    assert refused.status_code == 422, refused.text
    assert "has capital letters" in refused.text
