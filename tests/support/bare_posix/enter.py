"""Program that runs a command in bare POSIX: `python -m tests.support.bare_posix.enter FOLDER COMMAND…`.

The process must have its own mount namespace. FOLDER gets a file system in memory, which contains the temporary folder
of the command, and which disappears with the last process of the namespace.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.bare_posix import HERE, system_calls
from tests.support.mounts import BIND, MOVE, READ_ONLY, RECURSIVE, mount

DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")

OPEN_FILES = 256
"""Soft limit of macOS. A program may raise its limit, as on macOS."""

TEMPORARY_BYTES = 48
"""Length of the path of macOS's temporary folder."""


def cover(folder: Path) -> Path:
    """Mount empty folders over the folders that macOS lacks. Return a folder that still has the process table."""
    mount("tmpfs", folder, "tmpfs", options="mode=755")
    processes, devices = folder / "processes", folder / "devices"
    processes.mkdir()
    mount("/proc", processes, flags=BIND | RECURSIVE)
    devices.mkdir()
    mount("tmpfs", devices, "tmpfs", options="mode=755,size=64k")
    for name in DEVICES:
        (devices / name).touch()
        mount(f"/dev/{name}", devices / name, flags=BIND)
    (devices / "pts").mkdir()
    mount("/dev/pts", devices / "pts", flags=BIND | RECURSIVE)
    # macOS has /dev/fd, which is a part of /proc on Linux.
    (devices / "fd").symlink_to(processes / "self" / "fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (devices / name).symlink_to(f"fd/{number}")
    mount(devices, "/dev", flags=MOVE)
    for name in ("/proc", "/sys"):
        mount("tmpfs", name, "tmpfs", READ_ONLY)
    return processes


def make_temporary_folder(folder: Path) -> Path:
    """Create a temporary folder whose path is long and contains a symbolic link, as on macOS."""
    (folder / "private").mkdir()
    (folder / "var").symlink_to("private/var")
    name = "folders/zz/zyxvpxvq6"
    name += "0" * (TEMPORARY_BYTES - len(f"{folder}/var/{name}/T"))
    (folder / "private/var" / name / "T").mkdir(parents=True)
    return folder / "var" / name / "T"


def main(folder: Path, argv: list[str]) -> None:
    env = {
        **os.environ,
        "BARE_POSIX_PROCESSES": str(cover(folder)),
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT)]),
        "TMPDIR": str(make_temporary_folder(folder)),
    }
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    system_calls.refuse()
    os.execvpe(argv[0], argv, env)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
