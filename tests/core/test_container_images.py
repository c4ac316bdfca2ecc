"""References of container images, and the manager's record of the images of pools."""

from __future__ import annotations

import pytest

from batchlab.core import container_images
from batchlab.core.container_images import MAX_IMAGES
from batchlab.core.errors import Malformed

DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("reference", "repository", "digest"),
    [
        ("tools", "tools", ""),
        ("host:5000/team/tools", "host:5000/team/tools", ""),
        (f"host:5000/team/tools:1@{DIGEST}", "host:5000/team/tools", DIGEST),
    ],
)
def test_parts_of_a_reference(reference: str, repository: str, digest: str) -> None:
    assert container_images.repository_of(reference) == repository
    assert container_images.digest_of(reference) == digest


def test_record_keeps_the_images_that_a_pool_had() -> None:
    record = container_images.with_current({}, {"a": "x:1", "b": ""})
    assert record == {"a": ["x:1"]}
    record = container_images.with_current(record, {"a": "x:2"})
    record = container_images.with_current(record, {"a": "x:1"})
    assert record == {"a": ["x:2", "x:1"]}
    assert container_images.with_current(record, {"a": ""}) == {"a": ["x:2", "x:1", ""]}
    assert container_images.decode_images(container_images.encode_images(record)) == record
    many = container_images.with_current({"a": [f"x:{n}" for n in range(99)]}, {"a": "y"})["a"]
    assert (len(many), many[-1]) == (MAX_IMAGES, "y")


def test_worker_selects_only_among_the_recorded_images() -> None:
    recorded = ["x:1", "x:2"]
    assert container_images.image_of_worker(recorded, "x:1") == "x:1"
    assert container_images.image_of_worker(recorded, "evil:1") == "x:2"
    assert container_images.image_of_worker(recorded, "") == "x:2"
    assert container_images.image_of_worker([*recorded, ""], "evil:1") == ""
    assert container_images.image_of_worker([], "evil:1") == ""


@pytest.mark.parametrize(
    "doc",
    [
        "",
        "[]",
        "{}",
        '{"pools": {"a": ["--privileged"]}}',
        '{"pools": {"a": [1]}}',
        '{"pools": {"a": [0]}}',
        '{"pools": {"a": "x"}}',
        '{"pools": {"a": {"x": 1}}}',
        '{"pools": {"a": null}}',
        "[" * 100_000,
    ],
)
def test_damaged_record_is_malformed(doc: str) -> None:
    with pytest.raises(Malformed):
        container_images.decode_images(doc.encode())
