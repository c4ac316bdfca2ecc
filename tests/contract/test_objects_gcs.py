"""The features of Google Cloud Storage beyond the contract of Objects, at a stub of its XML API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import pytest

from batchlab.adapters import gcs
from batchlab.adapters.limits import Bucket
from batchlab.core.errors import AlreadyExists, BackendError, NotFound, TooLarge
from batchlab.core.pricing.request_costs import RequestCounter, Requests
from tests.support.gcs_stub import Stub, served

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

LARGE = 9 * 1024 * 1024


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with served() as (stub, url):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url.removeprefix("http://"))
        stub.buckets["grid"] = {}
        yield stub


def test_a_missing_bucket_is_an_error_and_not_a_missing_object(stub: Stub) -> None:
    """NotFound would mean that nothing was committed."""

    async def check() -> None:
        objects = gcs.open_objects(Bucket("another"))
        for call in (objects.get("a"), objects.put("a", b""), objects.delete(["a"])):
            with pytest.raises(BackendError) as caught:
                await call
            assert not isinstance(caught.value, NotFound)

    asyncio.run(check())
    assert list(stub.buckets) == ["grid"]


def test_a_put_fails_if_the_object_changes_after_its_etag_was_compared(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = obstore.head

    def head(store: ObjectStore, key: str) -> ObjectMeta:
        found = read(store, key)
        stub.write("grid", key, b"run", None)  # the same content and ETag, a later generation
        return found

    async def check() -> None:
        objects = gcs.open_objects(Bucket("grid"))
        etag = await objects.put("control", b"run")
        monkeypatch.setattr(obstore, "head", head)
        with pytest.raises(AlreadyExists):
            await objects.put("control", b"cancel", if_match=etag)
        assert await objects.get("control") == b"run"

    asyncio.run(check())


def test_a_large_conditional_upload_gets_its_key_by_a_copy(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"1" * LARGE)

    async def check() -> None:
        objects = gcs.open_objects(Bucket("grid"))
        await objects.upload("files/a", path, if_absent=True)
        path.write_bytes(b"2" * LARGE)
        with pytest.raises(AlreadyExists):
            await objects.upload("files/a", path, if_absent=True)

    asyncio.run(check())
    assert stub.buckets["grid"]["files/a"].data == b"1" * LARGE
    assert list(stub.buckets["grid"]) == ["files/a"]
    assert not stub.uploads
    assert stub.requests.count("PUT /grid/files/a") == 2


def test_an_object_larger_than_the_limit_is_not_read(stub: Stub) -> None:
    stub.write("grid", "a", b"12345", None)

    async def check() -> None:
        objects = gcs.open_objects(Bucket("grid"))
        with pytest.raises(TooLarge):
            await objects.get("a", limit=4)
        assert await objects.get("a", limit=5) == b"12345"

    asyncio.run(check())


def test_requests_are_counted(stub: Stub) -> None:
    tally = RequestCounter()

    async def check() -> None:
        objects = gcs.open_objects(Bucket("grid", tally=tally))
        etag = await objects.put("a", b"1", if_absent=True)
        await objects.put("a", b"2", if_match=etag)
        await objects.get("a")
        await objects.delete(["a", "b"])

    asyncio.run(check())
    assert tally.read() == Requests(s3_puts=2, s3_gets=2, s3_deletes=2)
    assert len(stub.requests) == 6
