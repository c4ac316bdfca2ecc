"""Log file of one execution, to which the output of all tasks of the execution is appended.

Invariant: the output of a task is trimmed to a size limit, so a task cannot fill the disk. The module imports only the
standard library, because every child process imports the module.
"""

from __future__ import annotations

import os
import re

TASK_BYTES = 1024 * 1024
"""Maximum size in bytes of one task's output. A trim keeps the beginning and the end, each half of the maximum size."""
_EXECUTION_BYTES = 64 * 1024 * 1024
_MIN_SHARE_BYTES = 4096
_STRAY = re.compile("[\udc80-\udcff]")
# The output of a running task may reach _SLACK times its size limit before the worker trims the output.
_SLACK = 16


def share(start: int) -> int:
    """Return the size limit of task output that begins at byte `start` of the log.

    The size limit is small in a long log.
    """
    return min(TASK_BYTES, max(_MIN_SHARE_BYTES, _EXECUTION_BYTES - start))


def read(path: str, start: int, length: int) -> bytes:
    """Return a part of a log, or b"" if the log does not exist yet."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, length, start)
    finally:
        os.close(fd)


def text(data: bytes) -> str:
    """Decode output as text with the same number of bytes. Invalid UTF-8 bytes are replaced by `?`."""
    return _STRAY.sub("?", data.decode("utf-8", "surrogateescape"))


def overflowing(size: int, start: int) -> bool:
    """Return whether the output of a running task is so large that it must be trimmed now."""
    return size - start > _SLACK * share(start)


def trim(path: str, start: int) -> int:
    """Trim the output after byte `start` to its size limit, so that the beginning and the end of the output remain.

    Return the new size of the log. All writers append (O_APPEND), so output that is written during the trim follows the
    end. Output that is written between the read of the size and the truncation is lost together with the middle of the
    output.
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
