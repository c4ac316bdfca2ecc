"""Processes that race and are killed at a bucket of files, and S3's errors."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from obstore.store import S3Store

from batchlab.adapters.local import objects as local_files
from batchlab.adapters.local.objects import FilesInPlace, open_local
from batchlab.adapters.obstore_objects import ObstoreObjects
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, Throttled, Unreachable

RACE = """
import asyncio, sys
from pathlib import Path
from batchlab.adapters.local.objects import open_local
from batchlab.core.errors import AlreadyExists

async def race(root, who, rounds):
    objects = open_local(Path(root))
    async def create(key, size, slot):
        try:
            await objects.put(key, f"{who}.{slot},".encode() * size, if_absent=True)
        except AlreadyExists:
            return
        print(key, f"{who}.{slot}")
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(int(rounds)):
        for size in (1, 50_000):
            key = f"outcomes/{number}-{size}"
            await asyncio.gather(*(create(key, size, slot) for slot in range(4)))

asyncio.run(race(*sys.argv[1:]))
"""

PUT_FOR_EVER = """
import asyncio, itertools, sys
from pathlib import Path
from batchlab.adapters.local.objects import open_local

async def put(root, source):
    objects = open_local(Path(root))
    for number in itertools.count():
        letter = b"abcdefgh"[number % 8 : number % 8 + 1]
        await objects.put(f"o/create-{number}", letter * 3_000_000, if_absent=True)
        await objects.put("o/replaced", letter * 3_000_000)
        await objects.put("o/small", letter * 30_000)
        await objects.upload("o/uploaded", Path(source))
        print(number, flush=True)

asyncio.run(put(*sys.argv[1:]))
"""


def _start(script: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_conditional_creates_have_one_winner_across_processes(tmp_path: Path) -> None:
    """Four processes with four attempts each commit the same outcomes at once."""
    rounds = 40
    racers = [_start(RACE, tmp_path / "bucket", who, rounds) for who in range(4)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    wins = [line.split() for output in outputs for line in output.splitlines()]
    assert len(wins) == len({key for key, _ in wins}) == rounds * 2

    async def committed() -> None:
        objects = open_local(tmp_path / "bucket")
        for key, winner in wins:
            size = int(key.rpartition("-")[2])
            assert await objects.get(key) == f"{winner},".encode() * size

    asyncio.run(committed())


def test_a_killed_process_leaves_whole_objects_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"u" * 9_000_000)
    bucket = tmp_path / "bucket"
    for turn in range(6):
        putter = _start(PUT_FOR_EVER, bucket / str(turn), source)
        assert putter.stdout is not None
        putter.stdout.readline()
        time.sleep(0.004 * turn)
        putter.kill()
        putter.communicate()
    asyncio.run(_all_whole(bucket))


async def _all_whole(bucket: Path) -> None:
    objects = open_local(bucket)
    sizes = {"create": 3_000_000, "replaced": 3_000_000, "small": 30_000, "uploaded": 9_000_000}
    seen = set()
    async for page in objects.list(""):
        for info in page:
            kind = info.key.rpartition("/")[2].partition("-")[0]
            data = await objects.get(info.key)
            assert len(data) == info.size == sizes[kind]
            assert data == data[:1] * len(data)
            seen.add(kind)
    assert seen == set(sizes)


def test_leftovers_of_a_killed_put_are_hidden_and_block_no_writer(tmp_path: Path) -> None:
    async def check() -> None:
        objects = open_local(tmp_path)
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "key#1").write_bytes(b"half")
        assert [page async for page in objects.list("")] == []
        await objects.put("o/key", b"whole", if_absent=True)
        assert await objects.get("o/key") == b"whole"
        assert [info.key async for page in objects.list("o/") for info in page] == ["o/key"]

    asyncio.run(check())


REMAINS = ["jobs/j/spec.json", "jobs/j/s/outcomes/00/0.json", "code/a.zip", "grid/use.json"]


@pytest.mark.parametrize("key", REMAINS)
def test_an_empty_document_counts_as_absent(tmp_path: Path, key: str) -> None:
    """Release 0.1.0 did not wait for the disk, so a power cut could leave empty files."""

    async def check() -> None:
        objects = open_local(tmp_path)
        (tmp_path / key).parent.mkdir(parents=True)
        (tmp_path / key).touch()
        assert await objects.head(key) is None
        assert [page async for page in objects.list("")] == []
        for read in (objects.get(key), objects.get_if_changed(key, None)):
            with pytest.raises(NotFound):
                await read
        await objects.put(key, b"{}", if_absent=True)
        assert await objects.get(key) == b"{}"

    asyncio.run(check())


def test_an_empty_file_of_a_user_is_an_object(tmp_path: Path) -> None:
    async def check() -> None:
        objects = open_local(tmp_path)
        await objects.put("raw/j/empty.csv", b"")
        assert await objects.get("raw/j/empty.csv") == b""

    asyncio.run(check())


CODE = f"code/{hashlib.sha256(b'whole').hexdigest()}.zip"
TEMPLATE = f"grid/templates/{hashlib.sha256(b'[]').hexdigest()}.json"


@pytest.mark.parametrize(
    ("key", "torn", "whole"),
    [
        (CODE, b"who", b"whole"),
        (CODE, b"\0" * 5, b"whole"),
        (TEMPLATE, b"{}", b"[]"),
        ("jobs/j/spec.json", b'{"v": 1, "na', b"{}"),
        ("jobs/j/spec.json", b"\0" * 4096, b"{}"),
    ],
)
def test_a_torn_object_gives_way_to_a_conditional_create(tmp_path: Path, key: str, torn: bytes, whole: bytes) -> None:
    async def check() -> None:
        objects = open_local(tmp_path)
        (tmp_path / key).parent.mkdir(parents=True)
        (tmp_path / key).write_bytes(torn)
        await objects.put(key, whole, if_absent=True)
        assert await objects.get(key) == whole
        with pytest.raises(AlreadyExists):
            await objects.put(key, b"{}", if_absent=True)
        assert await objects.get(key) == whole
        assert [path.name for path in (tmp_path / key).parent.iterdir()] == [Path(key).name]

    asyncio.run(check())


def test_objects_on_files_may_be_read_in_place(tmp_path: Path) -> None:
    async def check() -> None:
        bucket = tmp_path / "new" / "bucket"
        await open_local(bucket).put("raw/ü %23.txt", b"content")
        files = FilesInPlace(bucket)
        path = files.path("raw/ü %23.txt")
        assert path is not None
        assert path.read_bytes() == b"content"
        assert files.path("raw") is None
        assert files.path("raw/other") is None
        for key in ("", "/a", "../a", "a/../b", "a//b"):
            with pytest.raises(ValueError, match="object key"):
                files.path(key)

    asyncio.run(check())


def test_two_calls_that_fetch_to_one_place_do_not_write_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A canceled call continues in its thread, at the same time as the next call."""
    both, copy, staged = threading.Barrier(2, timeout=10.0), local_files.copy_out, set[Path]()

    def copy_out(source: Path, target: Path) -> None:
        staged.add(target)
        copy(source, target)
        both.wait()

    async def act() -> None:
        objects = open_local(tmp_path / "bucket")
        await objects.put("functions/f", b"whole")
        monkeypatch.setattr(local_files, "copy_out", copy_out)
        calls = [objects.download("functions/f", tmp_path / "f") for _ in range(2)]
        assert await asyncio.gather(*calls) == [5, 5]

    asyncio.run(act())
    assert len(staged) == 2
    assert (tmp_path / "f").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_a_backend_error(tmp_path: Path) -> None:
    async def check() -> None:
        objects = open_local(tmp_path)
        await objects.put("secret", b"1")
        (tmp_path / "secret").chmod(0)
        with pytest.raises(BackendError) as caught:
            await objects.get("secret")
        assert type(caught.value) is BackendError

    asyncio.run(check())


class _Answer(BaseHTTPRequestHandler):
    """A handler that answers with the status at the end of the key."""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b"<Error><Code>Whatever</Code></Error>"
        self.send_response(int(self.path.rpartition("/")[2]))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_GET = do_HEAD = _answer  # noqa: N815 - names that http.server looks for

    def log_message(self, *args: object) -> None:
        pass


def _s3(port: int) -> ObstoreObjects:
    return ObstoreObjects(
        S3Store(
            "bucket",
            endpoint=f"http://127.0.0.1:{port}",
            region="us-east-1",
            access_key_id="x",
            secret_access_key="y",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )
    )


@pytest.fixture
def s3() -> Iterator[ObstoreObjects]:
    """Yield a store whose service answers each request with the status at the end of the key."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield _s3(server.server_port)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (412, AlreadyExists),
        # S3 returns ConditionalRequestConflict before a writer has won, so the request is repeated.
        (409, Throttled),
        (503, Throttled),
        (429, Throttled),
        (500, Unreachable),
        (404, NotFound),
        (403, BackendError),
    ],
)
def test_refused_conditional_create_suggests_a_remedy(
    s3: ObstoreObjects, status: int, kind: type[BackendError]
) -> None:
    with pytest.raises(BackendError) as caught:
        asyncio.run(s3.put(f"outcome/{status}", b"{}", if_absent=True))
    assert type(caught.value) is kind
    assert caught.value.__cause__ is not None


def test_reads_distinguish_busy_from_missing(s3: ObstoreObjects) -> None:
    with pytest.raises(Throttled):
        asyncio.run(s3.get("a/503"))
    with pytest.raises(NotFound):
        asyncio.run(s3.get("a/404"))
    with pytest.raises(Throttled):
        asyncio.run(s3.head("a/503"))
    assert asyncio.run(s3.head("a/404")) is None
    assert asyncio.run(s3.get_if_changed("a/304", '"etag"')) is None
    with pytest.raises(Throttled):
        asyncio.run(s3.get_range("a/503", 0, 10))


def test_a_service_that_does_not_answer_is_unreachable() -> None:
    with pytest.raises(Unreachable) as caught:
        asyncio.run(_s3(9).put("a", b"1"))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_delete_removes_empty_folders_and_keeps_the_others(tmp_path: Path) -> None:
    objects = open_local(tmp_path / "objects")

    async def act() -> None:
        for key in ("jobs/a/spec.json", "jobs/a/map/outcomes/5c/1.json", "files/a/map/5c/0/x", "files/b/y"):
            await objects.put(key, b"x")
        await objects.delete(["jobs/a/map/outcomes/5c/1.json", "files/a/map/5c/0/x", "files/c/missing"])

    asyncio.run(act())
    left = {str(path.relative_to(tmp_path / "objects")) for path in (tmp_path / "objects").rglob("*")}
    assert {name for name in left if not name.startswith(".")} == {
        "files",
        "files/b",
        "files/b/y",
        "jobs",
        "jobs/a",
        "jobs/a/spec.json",
    }
