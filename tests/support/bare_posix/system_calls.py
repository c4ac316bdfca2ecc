"""System calls of Linux that macOS lacks, and a filter of the kernel that lets them fail.

The filter is a program of the Berkeley Packet Filter (seccomp(2)). Every child process inherits it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

# Numbers of the architecture and of O_DIRECT, and the column of the numbers of system calls below. Old calls have no
# number on aarch64.
MACHINES = {"x86_64": (0xC000003E, 0x4000, 0), "aarch64": (0xC00000B7, 0x10000, 1)}
ABSENT = {
    "close_range": (436, 436),
    "copy_file_range": (326, 285),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "openat2": (437, 437),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "sched_getaffinity": (204, 123),
    "sched_setaffinity": (203, 122),
    "sendfile": (40, 71),  # macOS has another one
    "setns": (308, 268),
    "splice": (275, 76),
    "tee": (276, 77),
    "unshare": (272, 97),
    "vmsplice": (278, 75),
    "waitid": (247, 95),
}
"""Calls that always fail. eventfd, timerfd, and epoll are not in the list, because libraries use kqueue on macOS."""

_O_PATH, _O_TMPFILE = 0x200000, 0x400000
_AF_UNIX, _AF_NETLINK, _SOCK_SEQPACKET = 1, 16, 5
_SOCKET_OPTIONS = ((1, 16), (1, 17), (6, 12), (6, 18))
"""Levels and numbers of SO_PASSCRED, SO_PEERCRED, TCP_QUICKACK, and TCP_USER_TIMEOUT."""

_LOAD, _EQUALS, _HAS, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _FILTER = 22, 2


class Argument(NamedTuple):
    """Condition on the low 32 bits of an argument: it equals `value` after `mask`, or has one of the bits `value`."""

    position: int
    value: int
    mask: int = 0
    has: bool = False


class Rule(NamedTuple):
    numbers: tuple[int | None, int | None]
    error: int
    arguments: tuple[Argument, ...] = ()


def _rules(o_direct: int) -> Iterator[Rule]:
    for numbers in ABSENT.values():
        yield Rule(numbers, errno.ENOSYS)
    prctl, fcntl, prlimit, rename = (157, 167), (72, 25), (302, 261), (316, 276)
    for option in (1, 36):  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
        yield Rule(prctl, errno.EINVAL, (Argument(0, option),))
    for command in (10, 1026, 1031, 1033):  # F_SETSIG, F_NOTIFY, F_SETPIPE_SZ, F_ADD_SEALS
        yield Rule(fcntl, errno.EINVAL, (Argument(1, command),))
    yield Rule(prlimit, errno.ENOSYS, (Argument(0, 0xFFFFFFFF, has=True),))  # of another process
    yield Rule(rename, errno.EINVAL, (Argument(4, 0xFFFFFFFF, has=True),))
    flags = _O_TMPFILE | _O_PATH | o_direct
    yield Rule((257, 56), errno.EINVAL, (Argument(2, flags, has=True),))  # openat
    yield Rule((2, None), errno.EINVAL, (Argument(1, flags, has=True),))  # open
    for make in ((41, 198), (53, 199)):  # socket, socketpair
        yield Rule(make, errno.EAFNOSUPPORT, (Argument(0, _AF_NETLINK),))
        unix = (Argument(0, _AF_UNIX), Argument(1, _SOCK_SEQPACKET, mask=0xF))
        yield Rule(make, errno.EPROTONOSUPPORT, unix)
    for options in ((54, 208), (55, 209)):  # setsockopt, getsockopt
        for level, option in _SOCKET_OPTIONS:
            yield Rule(options, errno.ENOPROTOOPT, (Argument(1, level), Argument(2, option)))


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Return one instruction. A comparison skips `then` or `otherwise` instructions."""
    return struct.pack("=HBBI", code, then, otherwise, value)


def program(machine: str) -> bytes:
    """Return the filter for a kind of processor. Calls of 32-bit programs pass the filter."""
    architecture, o_direct, column = MACHINES[machine]
    steps = [_step(_LOAD, 4), _step(_EQUALS, architecture, then=1), _step(_RETURN, _ALLOW)]
    for rule in _rules(o_direct):
        number = rule.numbers[column]
        if number is None:
            continue
        left = 2 + sum(3 if argument.mask else 2 for argument in rule.arguments)
        steps += [_step(_LOAD, 0), _step(_EQUALS, number, otherwise=left - 1)]
        for argument in rule.arguments:
            steps.append(_step(_LOAD, 16 + 8 * argument.position))
            if argument.mask:
                steps.append(_step(_AND, argument.mask))
            left -= 3 if argument.mask else 2
            steps.append(_step(_HAS if argument.has else _EQUALS, argument.value, otherwise=left - 1))
        steps.append(_step(_RETURN, _FAIL | rule.error))
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def refuse() -> None:
    """Let the system calls fail in this process and in its future child processes."""
    steps = program(platform.machine())
    made = _Program(len(steps) // 8, steps)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.byref(made), 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, f"The kernel refuses the filter: {os.strerror(error)}.")
