"""Whose connection it is, by its port on this machine (Linux)."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from batchlab.worker.processes import family


def is_of(leaders: Collection[int], port: int) -> bool:
    """Whether the end of a connection at `port` of this machine is one of these processes', or of
    one that they have started."""
    links = {f"socket:[{inode}]" for inode in _inodes(port)}
    if not links:
        return False
    pids = {pid for leader in leaders for pid in family(leader)}
    return any(not links.isdisjoint(_open(pid)) for pid in pids)


def _inodes(port: int) -> list[str]:
    """Of the TCP sockets that have this local port."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(FileNotFoundError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port:
                    found.append(fields[9])
    return found


def _open(pid: int) -> list[str]:
    """What the process has open, as the kernel's links say it."""
    found = []
    # It may end, or close one, while it is looked at.
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - often, and in a hurry
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))  # noqa: PTH115
    return found
