"""A grid with its bucket in Google Cloud Storage, at a stub of its XML API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchlab import File, Grid
from batchlab.core.errors import BackendError, UsageError
from batchlab.runtime import factory
from batchlab.runtime.home import Home
from tests.support.gcs_stub import Stub, served


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with served() as (stub, url):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setenv("BATCHLAB_ENDPOINT", "gs://my-bucket")
        stub.buckets["my-bucket"] = {}
        yield stub


def test_files_and_results_travel_through_the_bucket(stub: Stub, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(4)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)

    home = Home(tmp_path / "home")
    with Grid("gcs", home=home.path, workers=2) as grid:
        files = [File(tmp_path / f"{number}.txt") for number in range(4)]
        assert list(grid.map(lambda file: file.read_text().upper(), files)) == [text.upper() for text in texts]
    assert [key for key in stub.buckets["my-bucket"] if "/outcomes/" in key]
    assert not home.objects.exists()
    assert {"endpoint.json", "ledger.sqlite", "queue.sqlite"} <= {
        path.name for path in home.backend_folder("gcs").iterdir()
    }
    # The home stores the bucket, so the next command need not name it.
    backend = factory.load("gcs", "gs://another")
    with pytest.raises(UsageError, match="has its bucket at gs://my-bucket, not at gs://another"):
        backend.find_place(home)


def test_a_bucket_that_cannot_be_listed_is_refused_before_a_manager_starts(stub: Stub, tmp_path: Path) -> None:
    backend = factory.load("gcs", "gs://another")
    with pytest.raises(BackendError) as caught:
        backend.provide(Home(tmp_path), lambda _: None)
    assert "gs://another cannot be listed: The bucket does not exist." in caught.value.message
    assert "gcloud auth application-default login" in caught.value.remedy
    assert list(stub.buckets) == ["my-bucket"]


def test_a_grid_needs_the_address_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHLAB_ENDPOINT", raising=False)
    with pytest.raises(UsageError, match="The backend gcs needs a bucket"):
        factory.load("gcs").provide(Home(tmp_path), lambda _: None)
    for address in ("http://127.0.0.1:4566/b", "gs://", "gs://Upper", "gs://a/b", "s3://bucket"):
        with pytest.raises(UsageError, match="is not the address of a bucket") as caught:
            factory.load("gcs", address)
        assert "gs://my-bucket" in caught.value.remedy
    with pytest.raises(UsageError, match="is not a URL"):
        factory.load("ministack", "gs://my-bucket")
    with pytest.raises(UsageError, match="does not use an endpoint"):
        factory.load("local", "gs://my-bucket")
