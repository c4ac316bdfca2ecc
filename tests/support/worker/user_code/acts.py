"""Handlers for the tests of ProcessRunner: some return, some raise, and some crash."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from batchlab.core.task_context import Context, File


def same(item: Any) -> Any:
    return item


def facts(item: Any, ctx: Context) -> dict[str, Any]:
    ctx.params["seen"] = True
    return {
        "item": item,
        "job": ctx.job,
        "stage": ctx.stage,
        "task": ctx.task,
        "attempt": ctx.attempt,
        "params": ctx.params,
        "pid": os.getpid(),
        "cwd": str(Path.cwd()),
        "scratch": str(ctx.scratch),
    }


def count(item: Any) -> None:
    """Add a line to a file at every run."""
    with Path(item["counter"]).open("a") as file:
        file.write(f"{item['n']}\n")


def act(item: Any, ctx: Context) -> Any:
    """Add a line to a file, and do the action that the item names. Any other item is returned."""
    name, *rest = item if isinstance(item, list) else [item]
    if "counter" in ctx.params:
        with Path(ctx.params["counter"]).open("a") as file:
            file.write(f"{ctx.task}\n")
    done = globals().get(f"do_{name}")
    return done(ctx, *rest) if done else item


def do_raise(ctx: Context, name: str) -> None:
    raise {
        "ValueError": ValueError("a bad value"),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "MemoryError": MemoryError("too much"),
        "BaseException": BaseException("base"),
    }[name]


def do_recurse(ctx: Context) -> None:
    do_recurse(ctx)


def do_chain(ctx: Context) -> None:
    try:
        ctx.save(b"", "../unsafe")
    except ValueError as error:
        raise RuntimeError("the second one") from error


def do_unprintable(ctx: Context) -> None:
    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise SystemExit(9)

    raise UnprintableError


def do_exit(ctx: Context, *code: Any) -> None:
    sys.exit(*code)


def do_die(ctx: Context, code: int) -> None:
    print("last words")
    os._exit(code)


def do_signal(ctx: Context, number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(30)


def do_slain(ctx: Context, times: int) -> str:
    """Kill the process with SIGKILL in the first `times` runs."""
    begun = Path(ctx.params["counter"]).read_text().split().count(str(ctx.task))
    if begun <= times:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    return "spared"


def do_segfault(ctx: Context) -> None:
    ctypes.string_at(1)


def do_close_everything(ctx: Context) -> str:
    os.closerange(0, 100)
    return "closed"


def do_close_and_reuse(ctx: Context) -> str:
    os.closerange(0, 100)
    for number in range(100):
        os.open(ctx.scratch / str(number), os.O_RDWR | os.O_CREAT)
    return "reused"


def do_close_streams(ctx: Context) -> str:
    sys.stdout.close()
    sys.stderr.close()
    os.close(1)
    os.close(2)
    return "closed"


def do_replace_streams(ctx: Context) -> str:
    sys.stdout = sys.stderr = (ctx.scratch / "mine").open("w")
    return "replaced"


def do_leave_folder(ctx: Context) -> str:
    os.chdir(ctx.scratch)
    return "left"


def do_remove_folder(ctx: Context) -> str:
    Path.cwd().rmdir()
    return "removed"


def do_cwd(ctx: Context) -> str:
    return str(Path.cwd().name)


def do_write_everywhere(ctx: Context) -> str:
    for fd in [int(link.name) for link in Path("/dev/fd").iterdir()]:
        if fd < 3:
            continue
        with contextlib.suppress(OSError):
            os.write(fd, b'{"not": "ours"}\nnor [this\n')
    return "written"


def do_fork(ctx: Context) -> str:
    return "parent" if os.fork() else "child"


def do_fork_and_fail(ctx: Context) -> str:
    if os.fork():
        return "parent"
    raise ValueError("in the fork")


def do_thread(ctx: Context) -> str:
    threading.Thread(target=time.sleep, args=(60,), daemon=False).start()
    return "threaded"


def do_thread_exit(ctx: Context) -> str:
    """End the process while the next task is running, or while no task is running."""
    threading.Timer(0.02, os._exit, (7,)).start()
    return "set"


def do_linger(ctx: Context) -> int:
    """Leave a program running that holds all open files."""
    return subprocess.Popen(["sleep", "60"], close_fds=False).pid


def do_sleep(ctx: Context, seconds: float, *marks: str) -> str:
    for mark in marks:
        Path(mark).write_text(str(os.getpid()))
    time.sleep(seconds)
    return "slept"


def do_sleep_in_program(ctx: Context, mark: str) -> None:
    program = subprocess.Popen(["sleep", "60"])
    Path(mark).write_text(str(program.pid))
    program.wait()


def do_grow(ctx: Context, mib: int, seconds: float = 30.0) -> int:
    data = bytearray(mib * 2**20)
    data[::4096] = b"x" * len(data[::4096])
    time.sleep(seconds)
    return len(data)


def do_grow_in_program(ctx: Context, mib: int) -> None:
    code = f"import time; x = b'x' * ({mib} << 20); time.sleep(30)"
    subprocess.run([sys.executable, "-c", code], check=True)


KEPT: list[bytes] = []


def do_leak(ctx: Context, mib: int) -> int:
    KEPT.append(os.urandom(1) * (mib * 2**20))
    return os.getpid()


def do_print(ctx: Context, text: str) -> str:
    print(text)
    return "printed"


def do_print_and_hang(ctx: Context, text: str) -> None:
    print(text)
    time.sleep(30)


def do_print_everywhere(ctx: Context) -> None:
    print("out", end=" ", flush=True)
    print("err", file=sys.stderr, flush=True)
    os.write(1, b"raw\n")
    libc = ctypes.CDLL(None)
    libc.printf(b"c\n")
    libc.fflush(None)
    subprocess.run(["sh", "-c", "echo program; echo its errors >&2"], check=True)
    libc.printf(b"late\n")


def do_chatter(ctx: Context, lines: int) -> None:
    for number in range(lines):
        print(f"{number:099d}")


def do_return(ctx: Context, what: str) -> Any:
    return {
        "set": {"deep": [0, {1}]},
        "nan": [float("nan")],
        "bytes": b"x",
        "generator": (i for i in range(3)),
        "surrogate": "\udcff",
        "big": {"text": "x" * 40_000},
        "missing": File("/nowhere/at/all"),
        "folder": File(ctx.scratch),
    }[what]


def do_save(ctx: Context, *names: str) -> Any:
    return [ctx.save(name.encode(), name) for name in names]


def do_save_silently(ctx: Context) -> None:
    ctx.save(b"kept", "kept.txt")


def do_write_here(ctx: Context, text: str) -> File:
    """Write a file in the current folder. Every task uses the same file name."""
    Path("result.txt").write_text(text)
    return File("result.txt")


def do_foreign(ctx: Context, *paths: str) -> list[File]:
    return [File(path) for path in paths]


def read(item: Any) -> Any:
    """Return the item with each file replaced by its content."""
    if isinstance(item, File):
        return [item.name, item.size, item.read_text(), item.open("r").readline()]
    if isinstance(item, list):
        return [read(one) for one in item]
    if isinstance(item, dict):
        return {key: read(one) for key, one in item.items()}
    return item


def where(item: File) -> str:
    return str(item.path)


def change(item: File) -> File:
    item.path.write_text("changed")
    return item


def optional(item: Any, verbose: bool = False) -> Any:
    return [item, verbose]


def by_name(item: Any, ctx: Any = None) -> Any:
    return [item, ctx.task]


def three(a: Any, b: Any, c: Any) -> None: ...


def nothing() -> None: ...


class Callable:
    def __call__(self, item: Any, ctx: Context) -> Any:
        return [item, ctx.task]


instance = Callable()
not_callable = 3


def work_of(item: Any) -> None:
    """Use the CPU for `item[0]` seconds, with `item[1]` MiB of memory."""
    memory = b"x" * (item[1] * 1024**2)
    end_s = time.process_time() + item[0]
    while time.process_time() < end_s:
        len(memory)
