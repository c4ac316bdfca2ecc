"""A file system in an image file, for tests of power cuts.

A copy of the image contains only the data that had reached the disk. The tests need root and a loop device.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SIZE_BYTES = 64 * 2**20
_MKFS = ("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-m", "0")
# With these options of mkfs, no kernel thread writes into a fresh file system on its own.
_NOT_LAZY = ("-E", "lazy_itable_init=0,lazy_journal_init=0")

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="only root may mount an image"
)


def run(*argv: str | Path) -> str:
    """Return the output of a command. Fail if the command fails."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert not done.returncode, (argv, done.stderr)
    return done.stdout


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    """Mount the file system in `image` at the folder `at`. The image is created if it does not exist."""
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        run(*_MKFS, *_NOT_LAZY, image)
    at.mkdir()
    run("mount", "-o", "loop", image, at)
    try:
        yield at
    finally:
        # A lazy unmount succeeds even if a failed test has left files open.
        run("umount", "--lazy", at)


class Gate:
    """A gate that stops each writing thread at its next system call, wherever the thread is in a write.

    The event loop's thread closes the gate.
    """

    CALLS = ("fdatasync", "fsync", "link", "rename", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self._open.set()
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._gated(getattr(os, name)))

    def _gated(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait() -> None:
            if threading.current_thread() is not threading.main_thread():
                self._open.wait()

        def gated(*args: Any, **kwargs: Any) -> Any:
            wait()
            try:
                return call(*args, **kwargs)
            finally:
                wait()

        return gated

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


def cut(image: Path, copy: Path) -> None:
    """Copy the image at a moment at which nothing writes to the image."""
    device = run("losetup", "-n", "-O", "NAME", "-j", image).strip()
    counters = Path("/sys/block") / Path(device).name / "stat"
    deadline_s = time.monotonic() + 10
    while True:
        before = _written(counters)
        run("cp", "--sparse=always", image, copy)
        if before is not None and before == _written(counters):
            return
        assert time.monotonic() < deadline_s, "the disk is never quiet"


def _written(counters: Path) -> int | None:
    """Return the number of finished writes, or None while a write is in progress."""
    fields = [int(field) for field in counters.read_text().split()]
    return None if fields[8] else fields[4]
