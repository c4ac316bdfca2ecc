"""User code that misbehaves, one function per kind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from batchlab.core.task_context import Context, File


def act(item: Any, ctx: Context) -> Any:
    """Do what a text names, or return any other item as a well-behaved neighbor does."""
    if isinstance(item, str):
        return globals()[item](ctx)
    print(f"item {item}")
    return item


# --- Exceptions ----------------------------------------------------------------------------------


class OddError(Exception):
    def __str__(self) -> str:
        raise SystemExit(9)


class WordyError(Exception):
    pass


class StuckError(Exception):
    """An error that cannot be pickled or copied."""

    def __init__(self, *, lock: object) -> None:
        super().__init__("stuck", lock)

    def __reduce__(self) -> Any:
        raise TypeError("not today")


def raises(ctx: Context) -> None:
    raise ValueError("a bad value")


def raises_a_novel(ctx: Context) -> None:
    raise WordyError("begin " + "word " * 1_000_000 + "end")


def raises_lines(ctx: Context) -> None:
    raise WordyError("one\ntwo\r\n\x1b[31mthree\x07\0")


def raises_unencodable(ctx: Context) -> None:
    raise WordyError("\udcff\ud800")


def raises_a_group(ctx: Context) -> None:
    raise ExceptionGroup("several", [ValueError("one"), ExceptionGroup("deep", [OSError("two")])])


def raises_what_cannot_be_pickled(ctx: Context) -> None:
    raise StuckError(lock=threading.Lock())


def raises_unprintable(ctx: Context) -> None:
    raise OddError


def raises_base(ctx: Context) -> None:
    raise BaseException("base")


def raises_interrupt(ctx: Context) -> None:
    raise KeyboardInterrupt


def exits_3(ctx: Context) -> None:
    sys.exit(3)


def exits_with_words(ctx: Context) -> None:
    sys.exit("no disk")


def recurses(ctx: Context) -> None:
    recurses(ctx)


def imports_what_is_missing(ctx: Context) -> None:
    importlib.import_module("a_module_that_is_not_there")


def imports_what_is_broken(ctx: Context) -> None:
    importlib.import_module("broken_syntax")


def needs_a_variable(ctx: Context) -> str:
    return os.environ["A_VARIABLE_THAT_IS_NOT_SET"]


def writes_to_a_full_disk(ctx: Context) -> None:
    with Path("/dev/full").open("wb") as file:
        file.write(b"x" * 65536)


def divides(ctx: Context) -> float:
    return 1 / 0


def runs_out_of_memory(ctx: Context) -> None:
    bytearray(1 << 60)


# --- Results -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: int
    b: Any


class Liar(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no items today")


def returns_an_object(ctx: Context) -> Any:
    return object()


def returns_a_set(ctx: Context) -> Any:
    return {"deep": [{1}]}


def returns_bytes(ctx: Context) -> Any:
    return b"\xff"


def returns_a_generator(ctx: Context) -> Iterator[int]:
    yield 1


def returns_nan(ctx: Context) -> Any:
    return {"mean": float("nan")}


def returns_a_huge_int(ctx: Context) -> Any:
    return 10**5000


def returns_half_a_character(ctx: Context) -> Any:
    return {"text": "\ud83d"}


def returns_itself(ctx: Context) -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def returns_a_tower(ctx: Context) -> Any:
    tower: list[Any] = []
    for _ in range(100_000):
        tower = [tower]
    return tower


def returns_a_liar(ctx: Context) -> Any:
    return Liar(a=1)


def returns_a_missing_file(ctx: Context) -> Any:
    return File("/nowhere/at/all")


def returns_a_folder(ctx: Context) -> Any:
    return File(ctx.scratch)


def returns_a_pipe(ctx: Context) -> Any:
    os.mkfifo(ctx.scratch / "pipe")
    return File(ctx.scratch / "pipe")


def returns_an_unsafe_name(ctx: Context) -> Any:
    (ctx.scratch / "x").write_text("x")
    return File(ctx.scratch / "x", name="../../x")


def saves_outside(ctx: Context) -> Any:
    return ctx.save(b"", "../../unsafe")


def saves_with_a_newline(ctx: Context) -> Any:
    return ctx.save(b"", "a\nb")


def saves_twice(ctx: Context) -> Any:
    return [ctx.save(b"1", "a"), ctx.save(b"2", "a")]


def returns_none(ctx: Context) -> Any:
    return None


def returns_odd_but_right(ctx: Context) -> Any:
    return [True, -0.0, "", "\0\u2028☃", {"$file": 1, "": {}}, Pair(1, (2,)), 10**4000 // 10**3990]


def returns_5_mb(ctx: Context) -> Any:
    return "x" * 5_000_000


# --- Effects on the process ----------------------------------------------------------------------


def segfaults(ctx: Context) -> None:
    ctypes.string_at(1)


def ends_its_process(ctx: Context) -> None:
    print("last words", flush=True)
    os._exit(0)


def kills_itself(ctx: Context) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def becomes_another_program(ctx: Context) -> None:
    os.execv("/bin/sh", ["sh", "-c", "exit 5"])


def stops_itself(ctx: Context) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loops(ctx: Context) -> None:
    while True:
        pass


def loops_in_c(ctx: Context) -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")


def swallows_everything(ctx: Context) -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def closes_everything(ctx: Context) -> None:
    os.closerange(0, 1000)


def writes_everywhere(ctx: Context) -> None:
    for fd in range(3, 30):
        with contextlib.suppress(OSError):
            os.write(fd, b"\xff\0garbage\n[1\n")


def closes_its_streams(ctx: Context) -> str:
    sys.stdin.close()
    sys.stdout.close()
    sys.stderr.close()
    os.closerange(0, 3)
    return "closed"


def prints_binary(ctx: Context) -> str:
    os.write(1, bytes(range(256)) * 4)
    sys.stdout.buffer.write(b"\xff\xfe")
    print("\udcff \ud800")
    return "printed"


def prints_without_end(ctx: Context) -> str:
    for _ in range(400):
        os.write(1, b"z" * 131_072)
    return "printed"


def forks(ctx: Context) -> str:
    return "parent" if os.fork() else "child"


def forks_and_raises(ctx: Context) -> str:
    if os.fork():
        return "parent"
    raise ValueError("in the fork")


def leaves_a_raising_thread(ctx: Context) -> str:
    thread = threading.Thread(target=divides, args=(ctx,))
    thread.start()
    thread.join()
    return "left"


def leaves_a_program(ctx: Context) -> str:
    subprocess.Popen(["sleep", "600"], close_fds=False)
    return "left"


def changes_folder(ctx: Context) -> str:
    os.chdir("/")
    return "changed"


def deletes_its_folder(ctx: Context) -> str:
    shutil.rmtree(Path.cwd())
    return "deleted"


def deletes_its_scratch(ctx: Context) -> str:
    shutil.rmtree(ctx.scratch)
    shutil.rmtree(ctx.folder)
    return "deleted"


def deletes_the_whole_execution(ctx: Context) -> str:
    shutil.rmtree(ctx.folder.parent)
    return "deleted"


def changes_the_umask(ctx: Context) -> str:
    os.umask(0o777)
    return "changed"


def tells_the_umask(ctx: Context) -> str:
    before = os.umask(0)
    os.umask(before)
    return f"{before & 0o700:o}"


def sets_an_alarm(ctx: Context) -> str:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return "set"


def dozes(ctx: Context) -> str:
    time.sleep(0.15)
    return "awake"


def forbids_recursion(ctx: Context) -> str:
    sys.setrecursionlimit(60)
    return "forbidden"
