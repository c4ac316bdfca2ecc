"""Objects for user code: files as inputs and results, and the context of a task.

Every child process imports the module at start-up, so the module imports only a small part of the standard library.

Invariant: the path of an accepted relative file name is always inside its folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from batchlab.core.atomic_write import STAGED


def name_problem(name: str) -> str | None:
    """Return the reason why `name` is not a safe relative file name, as the end of a sentence, or None if `name` is
    safe.
    """
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name:
        return "must be a relative name such as 'part.csv' or 'charts/part.png'"
    if any(part in ("", ".", "..") for part in parts):
        return "must not have empty parts, '.' or '..' in it"
    if not name.isprintable() or any(STAGED.search(part) for part in parts):
        return "must be printable and must not end in '#' and digits"
    if len(name.encode()) > 512 or any(len(part.encode()) > 200 for part in parts):
        return "is too long"
    return None


class FreeNames:
    """Relative file names in one folder. A file neither replaces another file, nor needs another file as its folder.

    Some file systems ignore case and the Unicode form of a letter. Names that differ only there count as equal.
    """

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: set[str] = set()
        """Folded names of the files, and of their folders with a final slash."""

    def take(self, name: str) -> str:
        """Return `name`, or `name` with a number in front of it if `name` is not free."""
        number, free = 1, name
        while self._clashes(parts := _folded(free).split("/")):
            number += 1
            # Change the first part of the path, because the name of the folder may be the cause of the conflict.
            free = f"{number}-{name}"
        self._taken.update("/".join(parts[:i]) + "/" for i in range(1, len(parts)))
        self._taken.add("/".join(parts))
        return free

    def _clashes(self, parts: list[str]) -> bool:
        above = {"/".join(parts[:i]) for i in range(1, len(parts))}
        whole = "/".join(parts)
        return whole in self._taken or f"{whole}/" in self._taken or bool(above & self._taken)


def _folded(name: str) -> str:
    if name.isascii():
        return name.lower()
    from unicodedata import normalize  # imported here because most tasks do not need it

    return normalize("NFD", normalize("NFD", name).casefold())


class File:
    """A local file: an input that was fetched for the task, or a file that a result refers to.

    Treat input files as read-only, because `path` is the stored object itself on some backends.
    """

    __slots__ = ("_origin", "name", "path")

    def __init__(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self.path = Path(path).absolute()
        self.name = name or self.path.name
        self._origin: tuple[Any, tuple[int, int]] | None = None

    @classmethod
    def fetched(cls, path: str, name: str, origin: Any) -> File:
        """Return a File for the local copy at `path` of the object that the encoded reference `origin` names."""
        file = cls(path, name)
        file._origin = (origin, file._stamp())
        return file

    def _stamp(self) -> tuple[int, int]:
        info = self.path.stat()
        return info.st_size, info.st_mtime_ns

    def origin(self) -> Any:
        """Return the reference that the file was fetched from, or None if the content of the file has changed."""
        if self._origin is None or not self.path.is_file():
            return None
        reference, stamp = self._origin
        return reference if self._stamp() == stamp else None

    @property
    def size(self) -> int:
        """Current size of the file in bytes."""
        return self.path.stat().st_size

    def __fspath__(self) -> str:
        return str(self.path)

    def open(self, mode: str = "rb", encoding: str | None = None) -> IO[Any]:
        """Open the file, by default for reading bytes."""
        return self.path.open(mode, encoding=encoding)

    def read_bytes(self) -> bytes:
        """Return the whole content of the file as bytes."""
        return self.path.read_bytes()

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the whole content of the file as text."""
        return self.path.read_text(encoding)

    def __repr__(self) -> str:
        return f"File({str(self.path)!r}, name={self.name!r})"


class Context:
    """Information about the task for its handler, passed as `ctx` to `def handler(item, ctx)`.

    `job` and `stage` are names, `task` is the task's index in the stage, and `attempt` counts the task's attempts from
    1.
    """

    def __init__(
        self, *, job: str, stage: str, task: int, attempt: int, params_json: str, folder: str, cwd: str
    ) -> None:
        self.job = job
        self.stage = stage
        self.task = task
        self.attempt = attempt
        self.saved: dict[str, File] = {}
        self._names = FreeNames()
        self.touched = False
        """Whether the task's folder was created."""
        self._folder = folder
        self._params_json = params_json
        self._params: dict[str, Any] | None = None
        self._cwd = cwd

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the job, copied for the task."""
        # Parse the parameters separately for each task, so that a handler's changes of the parameters do not affect
        # other tasks. Parse the parameters on demand, because most handlers do not read the parameters.
        if self._params is None:
            self._params = json.loads(self._params_json)
        return self._params

    @property
    def folder(self) -> Path:
        """Folder of the task's own files, including `scratch` and saved files."""
        return Path(self._folder)

    @property
    def scratch(self) -> Path:
        """Private folder for temporary files of the task. The folder is removed after the task."""
        return self.made("scratch")

    def save(self, content: str | os.PathLike[str] | bytes, name: str) -> File:
        """Save a large output of the task under a safe relative name. `content` is bytes or the path of a file.

        A saved file is stored when the task succeeds. A file inside `scratch` or the current folder is moved, and any
        other file is copied. Raise ValueError if the name is unsafe or in use.
        """
        if problem := name_problem(name):
            raise ValueError(f"cannot save {name!r}: the name {problem}")
        if name in self.saved:
            raise ValueError(f"cannot save {name!r}: this task has saved that name before")
        target = self.made("out") / self._names.take(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes | bytearray | memoryview):
            target.write_bytes(content)
        else:
            self.take(Path(content), target)
        file = self.saved[name] = File(target, name)
        return file

    def made(self, name: str) -> Path:
        """Create the subfolder `name` of the task's folder unless it exists, and return the path of the subfolder."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        self.touched = True
        return folder

    def take(self, source: Path, target: Path) -> None:
        """Move a file to `target` if the file belongs to the task, or copy it otherwise."""
        where = os.path.join(source.resolve().parent, "")  # noqa: PTH118 - os.path.join adds the final slash
        ours = [f"{self.folder.resolve() / 'scratch'}/"]
        if self._cwd:
            ours.append(f"{Path(self._cwd).resolve()}/")
        if where.startswith(tuple(ours)) and not source.is_symlink():
            source.replace(target)
            return
        import shutil  # imported here because shutil imports the compression modules, which would slow the start

        shutil.copyfile(source, target)
