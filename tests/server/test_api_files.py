"""The submission of a job with its files, and the download of results as one archive."""

from __future__ import annotations

import io
import json
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from batchlab.core.errors import UsageError
from batchlab.core.model import JobId
from batchlab.core.protocol import json_format, object_keys
from batchlab.server import job_views
from batchlab.server.http import job_files, tasks
from tests.support.processes import open_files
from tests.support.server.api import TOKEN, Rig, job, later

AUTH = {"Authorization": f"Bearer {TOKEN}"}
JOB = """\
name: sums
input: {files: data/*.txt, split: lines, size: 2}
params: {year: 2025}
stages:
  - name: map
    python: handlers:work
"""
CODE = "def work(part):\n    return 1\n"
FILES = [("sums/job.yaml", JOB), ("sums/handlers.py", CODE), ("sums/data/a.txt", "1\n2\n3\n")]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    # A sent archive is deleted after the answer.
    end_s = time.monotonic() + 5
    while left := list(tmp_path.iterdir()):
        assert time.monotonic() < end_s, left
        time.sleep(0.01)


def send(
    rig: Rig, files: Sequence[tuple[str, str]] = FILES, data: Sequence[tuple[str, str]] = (), **fields: Any
) -> httpx.Response:
    parts = [("files", (name, text.encode())) for name, text in files]
    parts += [("data", (name, text.encode())) for name, text in data]
    return rig.http.post("/v1/jobs/files", files=parts, data=fields, headers=AUTH)


def test_a_folder_becomes_a_job(rig: Rig) -> None:
    answer = send(rig, set=["year=2026"], token="one")
    assert answer.status_code == 201, answer.text
    view = answer.json()
    spec = json_format.job_from_json(json_format.loads(rig.run(rig.objects.get(object_keys.spec(JobId(view["id"]))))))
    assert dict(spec.params) == {"year": 2026}
    assert spec.input
    assert rig.run(rig.objects.get(spec.input.keys[0])) == b"1\n2\n3\n"
    assert spec.code
    with zipfile.ZipFile(io.BytesIO(rig.run(rig.objects.get(spec.code)))) as code:
        assert code.namelist() == ["handlers.py", "job.yaml"]
    again = send(rig, set=["year=2026"], token="one")
    assert again.json()["id"] == view["id"]
    assert send(rig).json()["id"] != send(rig).json()["id"]


def test_the_client_sends_the_share_that_replaces_the_share_of_the_job_file(rig: Rig) -> None:
    def share(number: int, text: str, share: str = "") -> str:
        files = {"job.yaml": text.encode(), "handlers.py": CODE.encode(), "data/a.txt": b"1\n"}
        return rig.client.submit_files(files, "job.yaml", [], f"share-{number}", share=share)["share"]

    with_share = JOB.replace("name: sums", "name: sums\nshare: teama")
    assert (share(1, JOB), share(2, with_share)) == ("", "teama")
    assert (share(3, JOB, "teamb"), share(4, with_share, "teamb")) == ("teamb", "teamb")
    with pytest.raises(UsageError, match="not a share identifier"):
        share(5, JOB, "two words")


def test_a_refused_share_is_checked_before_the_upload(rig: Rig) -> None:
    async def keys() -> set[str]:
        return {one.key for prefix in ("code/", "raw/") async for page in rig.objects.list(prefix) for one in page}

    def stored() -> set[str]:
        return rig.run(keys())

    accepted = send(rig, share="other", token="early")
    assert accepted.status_code == 201, accepted.text
    rig.client.set_share({"identifier": "research"})
    rig.client.set_share_policy({"only_listed": True})
    before, changed = stored(), [("job.yaml", JOB), ("handlers.py", f"{CODE}\n# changed"), ("data/a.txt", "9\n")]
    for name, told in {"two words": "not a share identifier", "other": "does not list the share 'other'"}.items():
        answer = send(rig, changed, share=name, token=f"late {name}")
        assert answer.status_code == 422, answer.text
        assert told in answer.text
    assert stored() == before
    # A repeated request is not refused, because the manager accepted the job before the policy.
    assert send(rig, share="other", token="early").json()["id"] == accepted.json()["id"]
    assert send(rig, changed, share="research", token="late").status_code == 201
    assert stored() > before
    rig.client.remove_share(None)


def test_files_need_no_folder_and_data_may_be_separate(rig: Rig) -> None:
    plain = [("job.yaml", JOB), ("handlers.py", CODE)]
    assert send(rig, plain, [("C/b.txt", "4\n"), ("c.txt", "5\n")]).status_code == 201
    elsewhere = [("my.yml", JOB.replace("data/", "in/put/")), plain[1]]
    answer = send(rig, elsewhere, [("b.txt", "4\n")], data_folder="in/put", job_file="my.yml")
    assert answer.status_code == 201, answer.text


def test_empty_file_field_is_ignored(rig: Rig) -> None:
    """Browsers send an empty file field if no file is chosen."""
    boundary = "x" * 20
    parts = [("files", name, text) for name, text in FILES] + [("data", "", "")]
    body = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n{text}\r\n"
        for field, name, text in parts
    )
    answer = rig.http.post(
        "/v1/jobs/files",
        content=f"{body}--{boundary}--\r\n".encode(),
        headers={**AUTH, "Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize(
    ("files", "fields", "told"),
    [
        ([("../job.yaml", JOB)], {}, "'../job.yaml'"),
        ([("/etc/passwd", JOB)], {}, "'/etc/passwd'"),
        ([("a/../../x.yaml", JOB)], {}, "must not have empty parts"),
        ([("a\\b.yaml", JOB)], {}, "must be a relative name"),
        ([*FILES, ("sums/job.yaml/x", "")], {}, "file and a folder"),
        ([*FILES, FILES[0]], {}, "Two files have the path"),
        ([("x/notes.txt", "")], {}, "The form does not contain a job file"),
        ([("a.yaml", JOB), ("b.yaml", JOB)], {}, "Each of a.yaml, b.yaml may be the job file"),
        (FILES, {"job_file": "other.yaml"}, "The form has no file 'other.yaml'"),
        (FILES, {"set": "year"}, "KEY=VALUE"),
        (FILES, {"set": "month=1"}, "month"),
        (FILES[:2], {}, "data/*.txt"),
        ([("job.yaml", "stages: [")], {}, "not YAML"),
        (
            [("job.yaml", JOB.replace("handlers:work", "handlers:play")), ("handlers.py", CODE)],
            {},
            "job.yaml:2: No file matches 'data/*.txt', looked for in the uploaded folder. Also in line",
        ),
        ([], {}, "The form does not contain files"),
    ],
)
def test_invalid_job_file_is_a_clear_error(
    rig: Rig, files: Sequence[tuple[str, str]], fields: dict[str, Any], told: str
) -> None:
    if not files:
        fields = {"token": "x"}
        answer = rig.http.post("/v1/jobs/files", files=[("other", ("x", b""))], data=fields, headers=AUTH)
    else:
        answer = send(rig, files, **fields)
    assert answer.status_code == 422, answer.text
    assert told in answer.json()["error"] + answer.json()["remedy"]


@pytest.mark.parametrize(
    "line",
    [
        "input: {files: /etc/hostname, split: lines}",
        "input: {files: ../../*, split: lines}",
        "input: {files: ['data/*.txt', '/**'], split: lines}",
        "input: {files: data/*.txt, split: lines}\ncode: /etc",
        "input: {files: data/*.txt, split: lines}\ncode: ../..",
        "input: {files: '~/x', split: lines}",
    ],
)
def test_a_job_file_names_nothing_but_what_came_along(rig: Rig, line: str) -> None:
    text = JOB.replace("input: {files: data/*.txt, split: lines, size: 2}", line)
    answer = send(rig, [("sums/job.yaml", text), *FILES[1:]])
    assert answer.status_code == 422
    assert "not among the uploaded files" in answer.json()["error"]


def test_upload_must_declare_a_bounded_length(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"

    kind = {**AUTH, "Content-Type": "multipart/form-data; boundary=x"}
    answer = rig.http.post("/v1/jobs/files", content=chunks(), headers=kind)
    assert (answer.status_code, answer.json()["remedy"]) == (422, "Send the header Content-Length.")
    answer = rig.http.post("/v1/jobs/files", json={}, headers=AUTH)
    assert "multipart/form-data" in answer.json()["error"]
    monkeypatch.setattr(job_files, "MAX_BYTES", 100)
    monkeypatch.setattr(job_files.check_length, "__defaults__", (100,))
    answer = send(rig)
    assert answer.status_code == 422
    assert "job submit" in answer.json()["remedy"]


def test_upload_is_streamed_to_disk_and_needs_space(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload must neither be in memory nor need many open files."""
    most_open = 0
    write = job_files._File.write

    def watched(self: job_files._File, data: bytes) -> int:
        nonlocal most_open
        most_open = max(most_open, open_files())
        return write(self, data)

    before = open_files()
    monkeypatch.setattr(job_files._File, "write", watched)
    many = [(f"sums/data/{number}.txt", "1\n" * 1000) for number in range(200)]
    assert send(rig, [*FILES, *many]).status_code == 201
    assert most_open < before + 20
    monkeypatch.setattr(job_files, "MIN_FREE_BYTES", 2**62)
    answer = send(rig)
    assert answer.status_code == 422
    assert "disk is too full" in answer.json()["error"]
    assert "job submit" in answer.json()["remedy"]


def test_code_that_is_sent_to_the_manager_has_a_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_files, "MAX_CODE_BYTES", 1000)
    data = ("sums/data/b.txt", "1\n" * 5000)
    assert send(rig, [*FILES, data]).status_code == 201, "data is not code"
    answer = send(rig, [*FILES, ("sums/model.bin", "x" * 5000)])
    assert answer.status_code == 422
    assert "The code folder" in answer.json()["error"]
    assert "batchlab-upload" not in answer.text


def test_form_field_cannot_bypass_the_limit(rig: Rig) -> None:
    answer = send(rig, job_file="x" * 100_000)
    assert answer.status_code == 400
    assert "maximum size" in answer.json()["error"]


# --- Results -------------------------------------------------------------------------------------


def test_results_are_one_archive() -> None:
    with Rig() as rig:  # a separate grid, because unfinished jobs share the window of the pool
        name = rig.submit(job(token="zip", tasks=3))
        rig.work(name, 3, bad=[1])
        rig.ended(name)
        answer = rig.http.get(f"/v1/jobs/{name}/results", headers=AUTH)
    assert answer.headers["content-type"] == "application/zip"
    assert f'filename="{name}.zip"' in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == [f"{name}/map.jsonl", f"{name}/summary.json"]
        rows = [json.loads(line) for line in archive.read(f"{name}/map.jsonl").splitlines()]
    assert rows == [{"task": 0, "value": 0}, {"task": 2, "value": 2}]


def test_archive_of_an_unknown_stage_leaves_no_file(rig: Rig) -> None:
    name = rig.submit(job(token="no-zip", tasks=1))
    answer = rig.http.get(f"/v1/jobs/{name}/results", params={"stage": "x"}, headers=AUTH)
    assert answer.status_code == 422
    assert "does not have a stage 'x'" in answer.json()["error"]
    assert rig.http.get("/v1/jobs/nowhere/results", headers=AUTH).status_code == 404


def test_an_archive_leaves_room_on_the_disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = rig.submit(job(token="room", tasks=1))
    monkeypatch.setattr(job_files, "MIN_FREE_BYTES", 2**62)
    answer = rig.http.get(f"/v1/jobs/{name}/results", headers=AUTH)
    assert answer.status_code == 422
    assert "job results" in answer.json()["remedy"]


FILE = {"$file": "files/x", "name": "x", "size": 1}
VALUE = {"$value": "files/v"}


@pytest.fixture(scope="module")
def grid() -> Iterator[Rig]:
    with Rig() as made:  # a separate grid, as in the test before
        yield made


def forged(rig: Rig, token: str, value: Any, **objects: bytes) -> str:
    """Create a job whose only result is `value`, stored in its outcome as a task could store it. Keys below files/
    become the keys of the job's own files."""
    name = rig.submit(job(token=token, tasks=1))
    rig.work(name, 1)
    rig.ended(name)
    (row,) = rig.run(rig.ledger.bundles(JobId(name), done=True))
    keys = rig.manager.ports.keys
    key = job_views.outcome_view(row, rig.run(keys.stored(JobId(name))))["key"]
    outcome = json_format.loads(rig.run(rig.objects.get(key)))
    assert outcome["values"] == [0]
    own = json.loads(json.dumps(value).replace('"files/', f'"files/{name}/'))
    rig.run(rig.objects.put(key, json_format.to_bytes({**outcome, "values": [own]})))
    for last, data in objects.items():
        rig.run(rig.objects.put(f"files/{name}/{last}", data))
    return name


def fetched(rig: Rig, name: str) -> httpx.Response:
    return rig.http.get(f"/v1/jobs/{name}/results", headers=AUTH)


def test_archive_stays_within_its_budget(grid: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MAX_BYTES", 10_000)
    monkeypatch.setattr(tasks, "MAX_VALUE_BYTES", 1000)
    small = forged(grid, "small", [FILE, VALUE], x=b"x" * 9000, v=b'"fits"')
    assert fetched(grid, small).status_code == 200
    often = forged(grid, "often", [VALUE] * 1000, v=b'"%s"' % (b"v" * 900))
    assert fetched(grid, often).status_code == 422
    large = forged(grid, "large", FILE, x=b"x" * 11_000)
    monkeypatch.setattr(grid.objects, "download", None)  # the value is refused before it is read
    answer = fetched(grid, large)
    assert answer.status_code == 422
    assert answer.json()["error"] == ("The job has more than 9.8 KiB of results, which is too large for an archive.")
    assert "`batchlab job results`, which fetches any" in answer.json()["remedy"]


@pytest.mark.parametrize("value", [VALUE, [VALUE, {"$value": "files/w"}]], ids=["one", "several of one result"])
def test_a_value_is_read_no_further_than_memory_is_granted(
    grid: Rig, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.setattr(tasks, "MAX_VALUE_BYTES", 1000)
    size = 1100 if value is VALUE else 600
    data = json.dumps("v" * (size - 2)).encode()
    name = forged(grid, f"value-{size}", value, v=data, w=data)
    monkeypatch.setattr(grid.objects, "get", _no_whole(grid.objects.get))
    answer = fetched(grid, name)
    assert answer.status_code == 422
    assert "without being a file" in answer.json()["error"]
    assert "job results" in answer.json()["remedy"]


def _no_whole(get: Any) -> Any:
    async def only_of_ours(key: str, *, limit: int | None = None) -> bytes:
        assert not key.startswith("files/"), "read whole, whatever its size"
        found: bytes = await get(key, limit=limit)
        return found

    return only_of_ours


def test_a_part_ends_where_its_file_does(grid: Rig) -> None:
    part = {"$part": "files/x", "start": 2, "stop": 10**15, "header": None, "name": "x"}
    name = forged(grid, "part", part, x=b"0123")
    answer = fetched(grid, name)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as zipped:
        assert zipped.read(f"{name}/files/map/0/x") == b"23"


def test_one_archive_is_made_at_a_time(grid: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    name = forged(grid, "turns", 1)
    begun, go_on = threading.Event(), threading.Event()
    pack = tasks._pack

    def slowly(*arguments: Any) -> Path:
        begun.set()
        assert go_on.wait(10)
        return pack(*arguments)

    monkeypatch.setattr(tasks, "_pack", slowly)
    first = later(lambda: httpx.get(f"{grid.url}/v1/jobs/{name}/results", headers=AUTH))
    assert begun.wait(10)
    with monkeypatch.context() as hurried:
        hurried.setattr("batchlab.server.answers.BUSY_WAIT_S", 0.05)
        refused = fetched(grid, name)
    go_on.set()
    assert first().status_code == 200
    assert refused.status_code == 503
    assert "creating or sending another archive" in refused.json()["error"]
    assert "job results" in refused.json()["remedy"]
    assert fetched(grid, name).status_code == 200
    # A failed download releases its place too.
    assert fetched(grid, "nowhere").status_code == 404
    assert fetched(grid, name).status_code == 200
