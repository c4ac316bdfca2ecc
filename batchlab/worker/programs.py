"""Tasks that run a program, with placeholders, execution, and output files.

Invariants: the arguments of a program never pass through a shell. A program succeeds only if all its declared outputs
exist. The module imports only light modules, because every child process imports the module.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from batchlab.core.protocol import values as placeholders
from batchlab.core.task_context import Context, File
from batchlab.core.text import signal_name
from batchlab.worker.handlers import Problem

if TYPE_CHECKING:
    import subprocess

_TAIL_BYTES = 4096
_POLL_MS = 50


def run(
    template: Sequence[str],
    stdout: str | None,
    code: str,
    item: Any,
    ctx: Context,
    on_end: Callable[[int], None] = lambda _: None,
) -> File | list[File] | dict[str, File | list[File]] | None:
    """Run a program and return its outputs: one File, a dict of Files by name, or None.

    `on_end` is called with the peak of the program's resident memory in bytes. An output whose name ends in a slash is
    a folder, which is returned as a list of Files. A failed program raises Problem.
    """
    call = prepare(template, stdout, code, item, ctx)
    _execute(call, on_end)
    written = {name: _output(ctx.made("out"), name) for name in call.outputs}
    if len(written) == 1:
        return next(iter(written.values()))
    return written or None


class Call(NamedTuple):
    """Program with prepared arguments, environment, and folders.

    `stdout` is the file for the program's standard output, or None for the log.
    """

    arguments: list[str]
    environment: dict[str, str]
    cwd: Path
    stdout: Path | None
    outputs: list[str]


def prepare(template: Sequence[str], stdout: str | None, code: str, item: Any, ctx: Context) -> Call:
    """Prepare the arguments, environment, and folders of a program. A failed preparation raises Problem."""
    if problems := placeholders.check(template):
        raise Problem("import", problems[0])
    names = placeholders.outputs(template)
    if stdout is not None and stdout not in names:
        names.append(stdout)
    out = ctx.made("out")
    for name in names:
        (out / name if name.endswith("/") else (out / name).parent).mkdir(parents=True, exist_ok=True)
    arguments = _arguments(template, code, item, ctx)
    target = out / stdout if stdout is not None else None
    return Call(arguments, _environment(code), ctx.scratch, target, names)


def _arguments(template: Sequence[str], code: str, item: Any, ctx: Context) -> list[str]:
    used = placeholders.used_keys(template)
    values = {"task": str(ctx.task), "code": code}
    inputs: list[str] = []
    if "scratch" in used:
        values["scratch"] = str(ctx.scratch)
    if "input" in used:
        values["input"] = _path(item, "item.json", ctx)
    if "inputs" in used or "inputs_list" in used:
        items = _flat(item if isinstance(item, list) else [item])
        inputs = [_path(part, f"{number}.json", ctx) for number, part in enumerate(items, start=1)]
    if "inputs_list" in used:
        listing = ctx.made("in") / "inputs.txt"
        listing.write_text("".join(f"{path}\n" for path in inputs))
        values["inputs_list"] = str(listing)
    for name in used:
        if name.startswith("params."):
            key = name.removeprefix("params.")
            if key not in ctx.params:
                raise Problem("import", f"The command uses {{params.{key}}}; the job does not define it.")
            value = ctx.params[key]
            values[name] = value if isinstance(value, str) else json.dumps(value)
    out = f"{ctx.folder / 'out'}/"
    return placeholders.expand(template, values, inputs, lambda name: out + name)


def _flat(items: list[Any]) -> Iterator[Any]:
    """Yield upstream results in order, with each list of Files expanded."""
    for item in items:
        if isinstance(item, list) and item and all(isinstance(part, File) for part in item):
            yield from item
        else:
            yield item


def _path(item: Any, name: str, ctx: Context) -> str:
    """Return the path of an item. A JSON value is first written to a file, with Files replaced by paths."""
    if isinstance(item, File):
        return str(item.path)
    path = ctx.made("in") / name
    path.write_text(json.dumps(item, default=_as_path))
    return str(path)


def _as_path(value: object) -> str:
    if isinstance(value, File):
        return str(value.path)
    raise Problem("input", f"A command does not accept an item of type {type(value).__name__}.")


# --- Running -------------------------------------------------------------------------------------


def _environment(code: str) -> dict[str, str]:
    environment = dict(os.environ)
    if code:
        # A program can call the job's own programs and modules by name.
        for name in ("PATH", "PYTHONPATH"):
            before = environment.get(name)
            environment[name] = f"{code}{os.pathsep}{before}" if before else code
    return environment


def _execute(call: Call, on_end: Callable[[int], None]) -> None:
    import subprocess  # `subprocess` is imported late, because its import is slow and most tasks are Python functions.

    program, *arguments = call.arguments
    with ExitStack() as stack:
        target: IO[bytes] | None = stack.enter_context(call.stdout.open("wb")) if call.stdout else None
        try:
            process = stack.enter_context(
                subprocess.Popen(
                    [_program(program, call.environment), *arguments],
                    cwd=call.cwd,
                    env=call.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=target,
                    stderr=subprocess.PIPE,
                )
            )
        except OSError as error:
            raise _cannot_run(program, error) from error
        last, memory_bytes = _relay(process)
    on_end(memory_bytes)
    if code_ := process.returncode:
        raise Problem("exit", _exit_reason(code_) + (f": {last}" if last else ""), code=code_)


def _program(name: str, environment: dict[str, str]) -> str:
    # Popen would search the PATH of the child process, not the PATH in `environment`.
    import shutil

    if "/" in name:
        return name
    found = shutil.which(name, path=environment.get("PATH"))
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return found


def _cannot_run(name: str, error: OSError) -> Problem:
    if error.errno == errno.ENOENT:
        reason = f"program {name!r} is not installed on the worker"
    elif error.errno == errno.E2BIG:
        reason = f"the arguments of program {name!r} are too long for the system: use {{inputs_list}}"
    else:
        reason = f"program {name!r} cannot run: {error.strerror}"
    return Problem("import", reason, error=type(error).__name__)


def _exit_reason(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"exit code {code} ({signal_name(-code)})"


def _relay(process: subprocess.Popen[bytes]) -> tuple[str, int]:
    """Copy the program's standard error to the log until the process ends.

    Return the last line, and the peak of the process's resident memory in bytes. The copy ends with the process, not
    with the pipe, because a descendant may keep the pipe open.
    """
    import select

    assert process.stderr is not None
    fd = process.stderr.fileno()
    os.set_blocking(fd, False)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    tail = b""
    while True:
        memory_bytes = _peak_after_end(process, os.WNOHANG)
        while (chunk := _read(fd)) is not None:
            if not chunk:
                if memory_bytes is None:
                    memory_bytes = _peak_after_end(process, 0)
                return _last_line(tail), memory_bytes or 0
            unwritten = chunk
            while unwritten:
                unwritten = unwritten[os.write(2, unwritten) :]
            tail = (tail + chunk)[-_TAIL_BYTES:]
        if memory_bytes is not None:
            return _last_line(tail), memory_bytes
        poller.poll(_POLL_MS)


def _peak_after_end(process: subprocess.Popen[bytes], options: int) -> int | None:
    """Return the peak of the resident memory in bytes if the process has ended, else None."""
    # Popen.wait does not return the resource usage of the process.
    pid, status, usage = os.wait4(process.pid, options)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


def _read(fd: int) -> bytes | None:
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None


def _last_line(data: bytes) -> str:
    lines = [line.strip() for line in data.decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _output(out: Path, name: str) -> File | list[File]:
    path = out / name
    if name.endswith("/"):
        paths = sorted(file for file in path.rglob("*") if file.is_file())
        return [File(file, file.relative_to(out).as_posix()) for file in paths]
    if not path.is_file():
        raise Problem("result", f"The command did not write its output {name!r}.")
    return File(path, name)
