"""The operating system: this process, and in the module `processes` other processes.

Invariant: only this package contains code that depends on the operating system. Each function has a portable
implementation. Linux has faster calls for the same functions. The variable BATCHLAB_PORTABLE selects the portable
implementation on Linux, so that Linux can test the behavior of other systems.

A task's child process imports this module, but not `processes`. Its import needs only the standard library.
"""

from __future__ import annotations

import os
import resource
import sys

PORTABLE_VARIABLE = "BATCHLAB_PORTABLE"
"""Environment variable that selects the portable implementation on Linux, unless the variable is empty."""

if sys.platform == "linux" and not os.environ.get(PORTABLE_VARIABLE):
    from batchlab.core.operating_system.linux import (
        CAN_FORK,
        cpu_count,
        end_with_parent,
        end_with_pipe,
        flush_data,
        peak_bytes,
        resident_bytes,
        set_process_name,
        since_boot_s,
    )
else:
    from batchlab.core.operating_system.portable import (
        CAN_FORK,
        cpu_count,
        end_with_parent,
        end_with_pipe,
        flush_data,
        peak_bytes,
        resident_bytes,
        set_process_name,
        since_boot_s,
    )

__all__ = [
    "CAN_FORK",
    "PORTABLE_VARIABLE",
    "cpu_count",
    "end_with_parent",
    "end_with_pipe",
    "flush_data",
    "peak_bytes",
    "raise_file_limit",
    "resident_bytes",
    "set_process_name",
    "since_boot_s",
]

MIN_OPEN_FILES = 1024
"""Open files for which a service raises its limit. Linux allows 1024 by default, and macOS allows 256.

A higher limit would be a risk for tasks, because the system call select cannot use a higher descriptor.
"""


def raise_file_limit() -> None:
    """Allow this process and its future child processes to open MIN_OPEN_FILES files, if the system permits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MIN_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
