"""Bare POSIX: an environment on Linux in which a program finds only what macOS also has.

- `enter.py` mounts empty folders over /proc, /sys, and /dev/shm, sets macOS's limit of open files, and creates a
  temporary folder with a long path behind a symbolic link.
- `system_calls.py` refuses the system calls that macOS lacks, in every program.
- `site/sitecustomize.py` removes Linux's names from Python's modules, and makes Python behave as on macOS: `spawn` is
  the start method, `os.fork` fails, the path of a Unix socket has at most 103 bytes, and a signal to a process group of
  zombies is an error. psutil reads the process table from another folder, because psutil needs no file on macOS.
- `command.py` runs a command in this environment. On a Mac, it runs the command unchanged.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
LINUX_NAMES = frozenset((HERE / "linux_names.txt").read_text().split())
"""Attributes, arguments of `getattr`, and functions of the C library that macOS lacks."""
