"""Executor that runs the tasks of an execution one after the other, in the calling process.

Invariant: results are encoded and refer only to objects that `TaskResult.uploads` stores. The module imports only the
standard library and light modules, because every child process imports the module.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from batchlab.core.protocol import values
from batchlab.core.task_context import Context, File, FreeNames, name_problem
from batchlab.worker import exception_pickling, handlers, programs

Json = Any

INLINE_BYTES = 32 * 1024
"""Maximum size of an encoded value that stays inline. A larger value is stored as an object."""

INLINE_WEIGHT = values.OUTCOME_WEIGHT // 4
"""Maximum total weight of the inline values of an execution. Values beyond the maximum weight are stored as objects.

The remaining three quarters of an outcome's weight limit are for failures, and for executions that need several
processes.
"""
MIN_OBJECT_LENGTH = 256
"""Minimum length of a value stored as an object. A shorter value stays inline, because a reference is about as long."""

MAX_EXCEPTION_BYTES = 32 * 1024
"""Maximum size of a pickled exception. The large parts of a larger exception are left out."""
MAX_EXCEPTIONS_BYTES = 1024 * 1024
"""Maximum size of all pickled exceptions of an execution, encoded in base64."""
NEW_TYPES_BYTES = MAX_EXCEPTIONS_BYTES // 4
"""Part of MAX_EXCEPTIONS_BYTES for the first exception of each type. Later exceptions refer to the first one."""

_MAX_SHORT_INT = 1 << 64
_NO_UPLOADS: list[tuple[str, str]] = []
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class ExecutionRequest(TypedDict):
    """Data that all tasks of an execution have in common, as sent to a child process."""

    handler: str | None
    """Handler as `module:function`, or the name of a pickled function."""
    function: str | None
    """File of the fetched pickled function."""
    command: list[str]
    stdout: str | None
    code: str
    """Folder of the job's unpacked code, or "" for a job without code."""
    params_json: str
    job: str
    stage: str
    attempt: int
    folder: str
    """Folder of the execution.

    The folder of a task is inside the execution's folder, and its name is the task's index.
    """
    cwd: str
    """Current folder while tasks run, or "" if tasks must not rely on a current folder."""
    prefix: str
    """Key prefix of the execution's files, including the final slash."""
    objects: bool
    """Whether items and results may be any Python object (the Python API), not only JSON."""


class TaskResult(NamedTuple):
    """Result of a task: the encoded value as JSON text, and the files (path, key) to store before the result."""

    text: str
    uploads: list[tuple[str, str]]


class TaskExecutor:
    """Executor of tasks with one handler. The constructor raises Problem if the handler cannot be loaded."""

    def __init__(self, request: ExecutionRequest) -> None:
        self._request = request
        self._pickles = request["objects"]
        self._room = INLINE_WEIGHT
        self._exceptions_room = MAX_EXCEPTIONS_BYTES
        self._first_of_type: dict[type, int] = {}
        """Task with the first pickled exception of each type."""
        self.touched = False
        """Whether the last task created its folder, which the worker must remove."""
        self.program_memory_bytes = 0
        """Peak memory in bytes of the last program that a task ran, or 0 if no task has run a program."""
        handler = request["handler"]
        try:
            self._call = handlers.load(handler, request["function"]) if handler else self._command
        except handlers.Problem as problem:
            problem.fault = self._without_paths(problem.fault)
            raise
        self._encode: Callable[[Any, Callable[[File], Json]], Json] = (
            values.encode_object if request["objects"] else values.encode
        )

    def run(self, task: int, item: Json) -> TaskResult:
        """Run one task. `item` is an encoded value with local references.

        Exceptions of user code propagate to the caller.
        """
        ctx = context(self._request, task)
        try:
            value = self._call(item if values.is_flat(item) else decode(item, pickles=self._pickles), ctx)
            value = handlers.complete(value)
            if type(value) is int and not ctx.saved and -_MAX_SHORT_INT < value < _MAX_SHORT_INT:
                return TaskResult(str(value), _NO_UPLOADS)
            return self._encode_result(value, ctx)
        finally:
            self.touched = ctx.touched

    def explain(self, task: int, error: BaseException) -> handlers.Fault:
        """Return the description of an exception that `run` raised for the task."""
        fault = self._without_paths(handlers.explain(error))
        if self._pickles and not isinstance(error, handlers.Problem):
            fault["pickled"] = self._pickle(task, error)
        return fault

    def _pickle(self, task: int, error: BaseException) -> str:
        """Return the pickled exception in base64, or a reference to another task's exception of the same type.

        Return "" if the type cannot be pickled.
        """
        first = self._first_of_type.get(type(error))
        if first is not None and self._exceptions_room < NEW_TYPES_BYTES + MAX_EXCEPTION_BYTES:
            return f"{exception_pickling.SAME_TYPE_PREFIX}{first}"
        max_bytes = min(MAX_EXCEPTION_BYTES, self._exceptions_room) * 3 // 4
        text = base64.b64encode(exception_pickling.pickled(error, max_bytes)).decode()
        self._exceptions_room -= len(text)
        if text:
            self._first_of_type.setdefault(type(error), task)
        return text

    def _without_paths(self, fault: handlers.Fault) -> handlers.Fault:
        # Paths of the worker are removed from the text, because paths differ between workers and do not help users.
        for path in (self._request["code"], self._request["folder"]):
            if path:
                for field in ("reason", "traceback"):
                    fault[field] = fault[field].replace(f"{path}/", "")
        return fault

    def _command(self, item: Any, ctx: Context) -> Any:
        request = self._request
        return programs.run(request["command"], request["stdout"], request["code"], item, ctx, self._set_program_memory)

    def _set_program_memory(self, size_bytes: int) -> None:
        self.program_memory_bytes = size_bytes

    def _encode_result(self, value: Any, ctx: Context) -> TaskResult:
        outputs = Outputs(f"{self._request['prefix']}{ctx.task}", ctx)
        try:
            for file in ctx.saved.values():
                outputs.file(file)
            text = _dumps(self._encode(value, outputs.file))
        except values.NotAValue as error:
            raise handlers.Problem("result", str(error)) from error
        weight = values.weight(text)
        if len(text) > INLINE_BYTES or (weight > self._room and len(text) > MIN_OBJECT_LENGTH):
            text = outputs.value(text)
        else:
            self._room -= weight
        return TaskResult(text, outputs.uploads)


def context(request: ExecutionRequest, task: int) -> Context:
    """Return the context of the task with the index `task`."""
    return Context(
        job=request["job"],
        stage=request["stage"],
        task=task,
        attempt=request["attempt"],
        params_json=request["params_json"],
        folder=f"{request['folder']}/{task}",
        cwd=request["cwd"],
    )


def decode(item: Json, *, pickles: bool) -> Any:
    """Decode an item, with a File for each local reference. A malformed item raises Problem of kind "input"."""
    try:
        return values.decode(item, _open, pickles=pickles)
    except Exception as error:
        reason = f"Its item cannot be read: {type(error).__name__}: {error}"
        raise handlers.Problem("input", reason, error=type(error).__name__) from error


def local_ref(path: str, name: str, origin: Json) -> Json:
    """Return a reference to an object whose content was fetched to `path`."""
    return {"$file": path, "name": name, "origin": origin}


def _open(reference: Json) -> File:
    return File.fetched(reference["$file"], reference["name"], reference["origin"])


class Outputs:
    """Files that the result of a task refers to, with their object keys."""

    def __init__(self, prefix: str, ctx: Context) -> None:
        self.uploads: list[tuple[str, str]] = []
        self._prefix = prefix
        self._ctx = ctx
        self._refs: dict[Path, Json] = {}
        self._names = FreeNames()

    def file(self, file: File) -> Json:
        """Return the reference to `file` for the result. A path that is not a file raises NotAValue."""
        origin = file.origin()
        if origin is not None:
            return origin
        if file.path in self._refs:
            return self._refs[file.path]
        if not file.path.is_file():
            what = "is not a regular file" if os.path.lexists(file.path) else "does not exist"
            raise values.NotAValue(f"The result names the file {file.path}, which {what}.")
        name = self._name(file)
        path = self._private_path(file.path, name)
        key = f"{self._prefix}/{name}"
        self.uploads.append((str(path), key))
        ref = self._refs[file.path] = values.file_ref(key, file.name, path.stat().st_size)
        return ref

    def value(self, text: str) -> str:
        """Add an encoded value as an object, and return the text of the object's reference."""
        path = self._ctx.made("value") / "value.json"
        path.write_text(text)
        key = f"{self._prefix}.value.json"
        self.uploads.append((str(path), key))
        return _dumps(values.value_ref(key, hashlib.sha256(text.encode()).hexdigest()))

    def _name(self, file: File) -> str:
        """Return a unique name for the file: the path relative to `out`, or the file's own name."""
        out = self._ctx.folder / "out"
        inside = file.path.is_relative_to(out)
        plain = file.path.relative_to(out).as_posix() if inside else file.name
        if problem := name_problem(plain):
            raise values.NotAValue(f"The result names the file {plain!r}, but a name {problem}.")
        # Two files must have different keys, and the key of a file must not be the folder of another file's key.
        return self._names.take(plain)

    def _private_path(self, path: Path, name: str) -> Path:
        """Return a path in the task's folder for the file, so that no other task can change the file."""
        if path.resolve().is_relative_to(self._ctx.folder.resolve()):
            return path
        target = self._ctx.made("kept") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._ctx.take(path, target)
        return target
