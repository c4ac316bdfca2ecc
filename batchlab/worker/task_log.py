"""The log file of one execution, to which everything a task prints is appended.

Invariant: no task keeps more of it than its share, so a chatty one cannot fill the disk. Imported
by every child process.
"""

from __future__ import annotations

import os
import re

TASK_BYTES = 1024 * 1024
"""What one task may keep of its output: the first and the last half of it."""
_EXECUTION_BYTES = 64 * 1024 * 1024
_LEAST_BYTES = 4096
_STRAY = re.compile("[\udc80-\udcff]")
# How far a running task may go beyond its share before the worker cuts it.
_SLACK = 16


def share(start: int) -> int:
    """Bytes a task may keep whose output begins at `start`: little once the log has grown long."""
    return min(TASK_BYTES, max(_LEAST_BYTES, _EXECUTION_BYTES - start))


def read(path: str, start: int, length: int) -> bytes:
    """That part of a log; b"" where there is none yet."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, length, start)
    finally:
        os.close(fd)


def text(data: bytes) -> str:
    """What was printed, as text of just as many bytes: each that is no UTF-8 becomes a `?`."""
    return _STRAY.sub("?", data.decode("utf-8", "surrogateescape"))


def overflowing(size: int, start: int) -> bool:
    """Whether a task that still runs has printed so much that it cannot wait for its end."""
    return size - start > _SLACK * share(start)


def trim(path: str, start: int) -> int:
    """Cut what follows `start` to its share, head and tail; returns the log's size then.

    Everybody appends (O_APPEND), so what is written meanwhile lands behind the tail, or is cut
    with the middle where it comes between reading the size and truncating.
    """
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        size = os.fstat(fd).st_size
        half = share(start) // 2
        if size - start <= 2 * half:
            return size
        tail = os.pread(fd, half, size - half)
        cut = size - start - 2 * half
        os.ftruncate(fd, start + half)
        os.write(fd, b"\n[... batchlab left out %d bytes ...]\n" % cut)
        os.write(fd, tail)
        return os.fstat(fd).st_size
    finally:
        os.close(fd)
