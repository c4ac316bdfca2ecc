"""Python as on macOS. Every Python of bare POSIX imports this module at its start."""

# ruff: noqa: PTH120, PTH123, PTH208 - the import of pathlib would slow down every start

from __future__ import annotations

import errno
import fcntl
import importlib.machinery
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PROCESSES = os.environ["BARE_POSIX_PROCESSES"]
AF_UNIX, MAX_PATH_BYTES = 1, 103

with open(f"{os.path.dirname(__file__)}/../linux_names.txt") as file:
    LINUX_NAMES = file.read().split()


def remove_names(module: ModuleType) -> None:
    for name in LINUX_NAMES:
        module.__dict__.pop(name, None)


def read_processes_elsewhere(psutil: Any) -> None:
    psutil.PROCFS_PATH = PROCESSES


def spawn_by_default(context: Any) -> None:
    context._default_context._default_context = context._concrete_contexts["spawn"]


LATER: dict[str, Callable[[ModuleType], None]] = {
    "socket": remove_names,
    "psutil": read_processes_elsewhere,
    "multiprocessing.context": spawn_by_default,
}


class ChangedImports:
    """Finder of the modules that are changed after their import."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = LATER.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if change else None
        if change and spec and spec.loader:
            load, change_it = spec.loader.exec_module, change

            def load_and_change(module: ModuleType) -> None:
                load(module)
                change_it(module)

            spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def check_address(sock: Any, address: object) -> None:
    if sock.family != AF_UNIX or not isinstance(address, str | bytes | os.PathLike):
        return
    path = os.fsencode(address)
    if path[:1] in (b"", b"\0"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if len(path) > MAX_PATH_BYTES:
        raise OSError("AF_UNIX path too long")


def check_group(group: int) -> None:
    """Raise PermissionError for a process group that has only zombies."""
    states = []
    for name in os.listdir(PROCESSES):
        if name.isdigit():
            try:
                with open(f"{PROCESSES}/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group:
                states.append(fields[0])
    if states and all(state in "ZX" for state in states):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def check(event: str, args: Any) -> None:
    if event in ("socket.bind", "socket.connect"):
        check_address(*args)
    elif event == "os.fork":
        raise OSError(errno.ENOSYS, "frameworks of macOS do not work in a fork")
    elif event == "os.killpg":
        check_group(args[0])
    elif event == "os.kill" and args[0] < -1:
        check_group(-args[0])


for loaded in (os, signal, select, fcntl, resource, time):
    remove_names(loaded)
if sys.version_info >= (3, 13):
    os.process_cpu_count = os.cpu_count
select.PIPE_BUF = 512  # type: ignore[misc]
sys.meta_path.insert(0, ChangedImports())
sys.addaudithook(check)
