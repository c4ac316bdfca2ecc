"""The proxy before an endpoint, which forwards everything unchanged unless a fault is active."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from batchlab.adapters.aws.endpoint import Endpoint, create_bucket
from batchlab.adapters.aws.objects import open_s3
from batchlab.adapters.aws.sqs import SqsQueue
from batchlab.core.errors import AlreadyExists, NotFound, Throttled
from batchlab.core.ports import Objects, Outgoing, QueueSpec
from batchlab.runtime import factory
from batchlab.runtime.factory import Backend
from batchlab.runtime.home import Home, Place
from batchlab.scenarios.faults.proxy import FaultProxy, is_port_of, run_proxy, with_proxy
from tests.support.aws.emulators import ministack_python

pytestmark = pytest.mark.anyio

BUCKET = "behind-a-front"


@pytest.fixture
def front(ministack: Endpoint) -> Iterator[FaultProxy]:
    assert ministack.url
    with run_proxy(FaultProxy(ministack.url)) as found:
        create_bucket(Endpoint(found.url), BUCKET)
        yield found


async def test_objects_pass_as_they_are(front: FaultProxy, tmp_path: Path) -> None:
    objects = open_s3(Endpoint(front.url), BUCKET)
    key = "a b/ü+%2F"
    etag = await objects.put(key, b"content")
    assert await objects.get(key) == b"content"
    found = await objects.head(key)
    assert found is not None
    assert (found.size, found.etag) == (7, etag)
    with pytest.raises(AlreadyExists):
        await objects.put(key, b"other", if_absent=True)
    with pytest.raises(NotFound):
        await objects.get("nothing")
    large = random.Random(3).randbytes(13 << 20)
    (tmp_path / "in").write_bytes(large)
    assert await objects.upload("large", tmp_path / "in") == len(large)
    assert await objects.download("large", tmp_path / "out") == len(large)
    assert (tmp_path / "out").read_bytes() == large
    listed = [one.key async for page in objects.list("") for one in page]
    assert listed == [key, "large"]
    await objects.delete([key, "large"])
    assert front.counts.asked > 8
    assert front.counts.refused == 0


async def test_s3_alone_is_refused_as_s3_refuses(front: FaultProxy) -> None:
    objects = open_s3(Endpoint(front.url), BUCKET)
    queue = SqsQueue(Endpoint(front.url), prefix="front-")
    front.rate = 1.0
    with pytest.raises(Throttled):
        await objects.put("a", b"x" * 2_000_000)
    await queue.ensure(QueueSpec("q"))
    await queue.send("q", [Outgoing("hello")])
    assert [one.body for one in await queue.receive("q", wait_s=1)] == ["hello"]
    await queue.remove("q")
    await queue.close()
    front.rate = 0.0
    await objects.put("a", b"1")
    assert await objects.get("a") == b"1"
    await objects.delete(["a"])
    assert front.counts.refused >= 1


async def test_a_share_is_a_share(front: FaultProxy) -> None:
    objects = open_s3(Endpoint(front.url), BUCKET)
    front.rate = 0.5

    async def put() -> bool:
        try:
            await objects.put("a", b"1")
        except Throttled:
            return False
        return True

    went_well = [await put() for _ in range(100)]
    front.rate = 0.0
    counts = front.counts
    assert 0.3 < counts.refused / counts.asked < 0.7
    assert any(went_well)


async def test_partitioned_process_waits_and_others_do_not(front: FaultProxy) -> None:
    objects = open_s3(Endpoint(front.url), BUCKET)
    front.cut(lambda port: is_port_of([os.getpid()], port))
    waiting = asyncio.ensure_future(objects.put("a", b"1"))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert front.counts.kept_waiting == 1
    front.cut(lambda port: is_port_of([os.getppid() + 10_000_000], port))
    await asyncio.wait_for(waiting, 5)
    front.cut(None)
    await objects.delete(["a"])


async def test_death_during_a_request_leaves_no_trace(front: FaultProxy, caplog: pytest.LogCaptureFixture) -> None:
    half = (
        f"PUT /{BUCKET}/half HTTP/1.1\r\nHost: {front.url[7:]}\r\nContent-Length: 100\r\n"
        "Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request\r\n"
        "\r\nhalf of it"
    )
    _, writer = await asyncio.open_connection("127.0.0.1", int(front.url.rpartition(":")[2]))
    writer.write(half.encode())
    await writer.drain()
    await asyncio.sleep(0.3)
    writer.close()
    await writer.wait_closed()
    objects = open_s3(Endpoint(front.url), BUCKET)
    await objects.put("whole", b"1")
    assert [one.key async for page in objects.list("") for one in page] == ["whole"]
    await objects.delete(["whole"])
    assert not caplog.records


def settled(backend: Backend, home: Home) -> Place:
    """Return the grid's place as a starting manager finds and stores it."""
    with backend.open_emulator(home) or nullcontext() as emulator:
        backend.settle(home, emulator)
        found = home.place("ministack")
    assert found
    return found


def test_a_home_with_a_named_endpoint_has_a_front_when_it_needs_one(ministack: Endpoint, tmp_path: Path) -> None:
    home = Home(tmp_path)
    named = factory.load("ministack", f"{ministack.url}/my-bucket")
    place = Place(str(ministack.url), "my-bucket", named=True)
    for endpoint in (named, factory.load("ministack"), named):
        with with_proxy(endpoint, home, print) as (backend, front):
            assert front is not None
            assert front.target == ministack.url
            there = settled(backend, home)
            assert (there.url, there.bucket, there.behind) == (front.url, "my-bucket", place.url)
        assert home.place("ministack") == place, "the front has gone, and nobody looks for it"
        for plain in (named, factory.load("ministack")):
            assert settled(plain, home) == place


def test_home_keeps_its_emulator_with_and_without_a_proxy(tmp_path: Path) -> None:
    ministack_python()
    home = Home(tmp_path)
    for number, has_front in enumerate((False, True, False, True)):
        with ExitStack() as stack:
            backend, front = factory.load("ministack"), None
            if has_front:
                backend, front = stack.enter_context(with_proxy(backend, home, print))
            emulator = backend.open_emulator(home)
            assert (emulator is None) == has_front
            if emulator:
                stack.enter_context(emulator)
            backend.settle(home, emulator)
            place = home.place("ministack")
            assert place
            assert (place.named, bool(place.behind)) == (False, has_front)
            kept = asyncio.run(_noted(backend.open_objects(home), f"{number}"))
            assert kept == [f"{one}" for one in range(number + 1)], "all in one bucket"
            if front:
                assert front.counts.asked


async def _noted(objects: Objects, key: str) -> list[str]:
    await objects.put(key, b"1")
    return [one.key async for page in objects.list("") for one in page]


def test_a_front_before_a_grid_that_never_came_up_is_forgotten(ministack: Endpoint, tmp_path: Path) -> None:
    home = Home(tmp_path)
    with with_proxy(factory.load("ministack", f"{ministack.url}/one"), home, print):
        assert home.place("ministack")
    assert home.place("ministack") is None
    with with_proxy(factory.load("ministack", f"{ministack.url}/other"), home, print) as (there, _):
        settled(there, home)
        settled(there, home)
    assert home.place("ministack") == Place(str(ministack.url), "other", named=True)


def test_proxy_left_by_a_killed_replay_does_not_interfere(ministack: Endpoint, tmp_path: Path) -> None:
    home = Home(tmp_path)
    place = Place(str(ministack.url), "my-bucket", named=True)
    for name in ("ministack", f"{ministack.url}/my-bucket"):
        home.backend_folder("ministack").mkdir(exist_ok=True)
        home.write_place("ministack", replace(place, url="http://127.0.0.1:9", behind=place.url))
        backend = factory.load("ministack", None if name == "ministack" else name)
        assert backend.find_place(home) == place
        assert settled(backend, home) == place


def test_location_file_without_a_proxy_is_readable(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.backend_folder("ministack").mkdir()
    said = {"url": "http://127.0.0.1:9", "bucket": "b-1", "named": True}
    (home.backend_folder("ministack") / "endpoint.json").write_text(json.dumps(said))
    assert home.place("ministack") == Place("http://127.0.0.1:9", "b-1", named=True)
    (home.backend_folder("ministack") / "endpoint.json").write_text(json.dumps({"url": "http://127.0.0.1:9"}))
    assert home.place("ministack") is None


@pytest.mark.parametrize("name", ["local", "localstack", "aws"])
def test_other_backends_are_left_as_they_are(name: str, tmp_path: Path) -> None:
    given = factory.load(name)
    with with_proxy(given, Home(tmp_path), print) as (backend, front):
        assert backend is given
        assert front is None
