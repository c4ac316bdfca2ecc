"""An image for instances that already contains the release, as a custom AMI does."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.aws.container_image import docker
from tests.support.aws.instance_boot import IMAGE, folder_of_run, instance_release


@pytest.fixture(scope="session")
def own_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the image once for all processes of a test run. The last process that uses the image removes it."""
    archive = instance_release(tmp_path_factory)
    place = folder_of_run(tmp_path_factory)
    (users := place / "own-image").mkdir(exist_ok=True)
    name = f"batchlab-test-ami-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}"
    mine = users / str(os.getpid())
    with _alone(place):
        if not any(users.iterdir()):
            _make(name, archive)
        mine.touch()
    try:
        yield name
    finally:
        with _alone(place):
            mine.unlink()
            if not any(users.iterdir()):
                _remove(name)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with (place / "own-image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(name: str, archive: Path) -> None:
    place = f"/opt/batchlab/releases/{archive.name.removesuffix('.tar.gz')}"
    script = f"mkdir -p {place} && tar -xzf /archive -C {place} && {place}/boot.sh image"
    mount = f"type=bind,source={archive},target=/archive,readonly"
    try:
        docker("run", "--name", name, "--network", "none", "--mount", mount, IMAGE, "sh", "-c", script)
        docker("commit", "--change", 'CMD ["/usr/local/sbin/begin"]', name, name)
    except BaseException:
        docker("rm", "--force", "--volumes", name)
        raise


def _remove(name: str) -> None:
    docker("rm", "--force", "--volumes", name)
    docker("rmi", "--force", name)
