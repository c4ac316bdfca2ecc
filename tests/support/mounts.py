"""Mounts of Linux, by system calls. The program umount needs /proc, which tests may cover."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

READ_ONLY, BIND, MOVE, RECURSIVE = 1, 1 << 12, 1 << 13, 1 << 14


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    words = [os.fsencode(word) for word in (source, target, kind)]
    _call("mount", target, *words, ctypes.c_ulong(flags), options.encode())


def unmount(target: str | Path) -> None:
    _call("umount2", target, os.fsencode(target), 0)


def _call(name: str, target: str | Path, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), os.fspath(target))


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a file system in memory at a new folder. Without root, skip the test on a laptop, or fail in CI."""
    folder.mkdir(parents=True)
    try:
        if sys.platform != "linux":
            raise PermissionError(f"{sys.platform} has no such file system")
        mount("tmpfs", folder, "tmpfs", options=f"size={size_bytes}")
    except OSError:
        if os.environ.get("CI"):
            pytest.fail("CI promises root, but no file system can be mounted")
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        unmount(folder)
