"""Endpoint that accepts a job file together with its code and data.

Invariant: the endpoint reads and writes only inside a temporary folder of the request, whatever the
names of the files and the contents of the job file are. It removes the folder afterwards.

Forms with files, written to disk while they arrive.

Invariant: no file of a form is kept in memory, and at most the file that arrives is open. Before
the first byte is read, the disk must have room for the whole form. A closed form leaves no files.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from batchlab.core import api_types
from batchlab.core.errors import JobFileError, UsageError
from batchlab.core.task_context import name_problem
from batchlab.core.text import size
from batchlab.manager.manager import Manager
from batchlab.server.http.common import Leader, guarded
from batchlab.server.http.jobs import accept, shown

if TYPE_CHECKING:
    from batchlab.jobs.job_file import JobFile

MIN_FREE_BYTES = 512 * 1024**2
"""Free space on the manager's disk that uploads and downloads never use, in bytes."""
MAX_FIELD_BYTES = 64 * 1024
_ROOMY = "/var/tmp"  # noqa: S108 - mkdtemp creates a folder in it


def disk_folder() -> str:
    """Return the folder for large temporary files. On many systems, the default temporary folder is
    in memory."""
    said = tempfile.tempdir or any(name in os.environ for name in ("TMPDIR", "TEMP", "TMP"))
    usual = tempfile.gettempdir()
    return usual if said or not os.access(_ROOMY, os.W_OK | os.X_OK) else _ROOMY


def has_room(folder: Path | str, size_bytes: int) -> bool:
    """Return whether MIN_FREE_BYTES stay free after `size_bytes` more are written."""
    return shutil.disk_usage(folder).free - size_bytes >= MIN_FREE_BYTES


async def form_with_files(
    request: Request, size_bytes: int, *, max_files: int, max_fields: int, remedy: str
) -> FormData:
    """Return the request's form, which the caller closes. `size_bytes` is the declared size of the
    request. Raise UsageError if the disk does not have room for it."""
    # Twice the size, because the manager copies and packs the upload before it removes it.
    if not has_room(disk_folder(), 2 * size_bytes):
        raise UsageError(f"The manager's disk has no room for {size(size_bytes)} that are sent to it.", remedy=remedy)
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="batchlab-form-", dir=disk_folder()))
    parser = _Parser(
        request.headers, request.stream(), max_files=max_files, max_fields=max_fields, max_part_size=MAX_FIELD_BYTES
    )
    parser.folder = folder
    try:
        form = await parser.parse()
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, MultiPartException):
            raise HTTPException(400, error.message) from error
        raise
    if not parser.files:
        await asyncio.to_thread(folder.rmdir)
    # Also removes the files of a form that is never closed, such as one of a refused request.
    weakref.finalize(form, shutil.rmtree, folder, ignore_errors=True)
    return form


class _Parser(MultiPartParser):
    """Starlette's parser keeps the files in memory, or open, until it has read all of them. This
    one writes them to `folder`."""

    folder: Path
    files: int = 0

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if part := self._current_part.file:
            part.file.close()
            part.file = cast(BinaryIO, _File(self.folder / str(self.files)))
            self._files_to_close_on_error[-1] = cast(Any, part.file)
            self.files += 1


class _File:
    """File of a form. It is open during a write, and from the first read until the next `seek`.
    `close` deletes it. With the last file, it also deletes the folder."""

    _rolled = False
    """Starlette reads this attribute. With False it writes without a thread, because small writes
    to the disk's cache are fast."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: IO[bytes] | None = None
        self._size_bytes = 0
        path.touch()

    def write(self, data: bytes) -> int:
        # One received block can contain many files of a form, and all of them are written before
        # the first one is ended.
        with self._path.open("ab") as file:
            self._size_bytes += file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._size_bytes

    def read(self, size: int = -1) -> bytes:
        self._open = self._open or self._path.open("rb")
        return self._open.read(size)

    def seek(self, offset: int) -> int:
        """Go back to the start, the only position that Starlette's forms use."""
        assert offset == 0
        self._shut()
        return 0

    def close(self) -> None:
        self._shut()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # fails while the folder contains other files
            self._path.parent.rmdir()

    def _shut(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


router = guarded()

MAX_BYTES = 1024**3
"""Limit of one upload. `batchlab job submit` stores more data in the bucket directly."""
MAX_CODE_BYTES = 64 * 1024**2
"""Limit of the code in an upload, because it is packed in memory."""
MAX_FILES = 5000
MAX_FIELDS = 200

_BY_HAND = "`batchlab job submit` takes any amount."
_TEXT = {"type": "string"}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {
                            **_FILES,
                            "description": "The job's folder: each file's name is its path. A "
                            "folder that all of them lie in is left out.",
                        },
                        "data": {**_FILES, "description": "More files, for `data_folder`."},
                        "data_folder": {**_TEXT, "default": "data"},
                        "job_file": {
                            **_TEXT,
                            "description": "Which of the files is the job file; unless said, the "
                            "only YAML file at the top.",
                        },
                        "set": {
                            "type": "array",
                            "items": _TEXT,
                            "description": "KEY=VALUE: replaces the default of a parameter.",
                        },
                        "token": {**_TEXT, "description": "The client token, to send again."},
                    },
                    "required": ["files"],
                }
            }
        },
    }
}


# --- Submission with files ------------------------------------------------------------------------


@router.post("/jobs/files", status_code=201, openapi_extra=_UPLOAD)
async def submit_files(manager: Leader, request: Request) -> api_types.JobView:
    """Submit a job file with its code and data, as files of a form."""
    size_bytes = check_length(request.headers.get("content-length"))
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise UsageError(
            f"A job's files come as multipart/form-data, not as {kind or 'nothing'}.",
            remedy="curl -F 'files=@job.yaml' does that.",
        )
    form = await read_form(request, size_bytes)
    try:
        return await submit_form(manager, form)
    finally:
        await form.close()


async def read_form(request: Request, size_bytes: int) -> FormData:
    """Return the form with a job's files. The caller closes it."""
    return await form_with_files(request, size_bytes, max_files=MAX_FILES, max_fields=MAX_FIELDS, remedy=_BY_HAND)


def check_length(text: str | None, most: int = MAX_BYTES) -> int:
    """Return the length of a body. Raise UsageError if it is missing or above the limit."""
    if text is None or not (text.isascii() and text.isdigit()):
        raise UsageError("The request does not say how long its body is.", remedy="Send a Content-Length.")
    if int(text) > most:
        raise UsageError(f"That is more than the {most / 2**20:,.0f} MiB that a request may bring.", remedy=_BY_HAND)
    return int(text)


async def submit_form(manager: Manager, form: FormData) -> api_types.JobView:
    """Submit the job that the files of the form define. The manager does not run the job's code."""
    from batchlab.jobs import submission

    files, data = _sent(form, "files"), _sent(form, "data")
    overrides = _overrides(str(one) for one in form.getlist("set"))
    named = _field(form, "job_file")
    data_folder = _field(form, "data_folder") or "data"
    token = _field(form, "token") or secrets.token_urlsafe(16)
    with _own_folder() as folder:
        names = _placed(files, data, data_folder)
        sources: list[tuple[IO[bytes], str]] = [
            (one.file, name) for one, name in zip([*files, *data], names, strict=True)
        ]
        await asyncio.to_thread(_write, folder, sources)
        path = folder / _job_file(names[: len(files)], named)
        jobfile, packed = await asyncio.to_thread(_loaded, path, folder, overrides)
        ports = manager.ports
        job = await submission.prepare(
            jobfile, objects=ports.objects, clock=ports.clock, patience=ports.patience, token=token, packed=packed
        )
    written = await accept(manager, job, None)
    return await shown(manager, written.rows.job)


def _sent(form: FormData, name: str) -> list[UploadFile]:
    """Return the files of one field. If the user chose no file, a browser sends one without a
    name."""
    return [one for one in form.getlist(name) if isinstance(one, UploadFile) and (one.filename or one.size)]


def _field(form: FormData, name: str) -> str:
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""


def _overrides(texts: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in (one.strip() for one in texts):
        key, equals, value = text.partition("=")
        if text and not (equals and key):
            raise UsageError(f"{text!r} is not KEY=VALUE.", remedy="Write for example year=2026.")
        if text:
            found[key] = value
    return found


@contextmanager
def _own_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="batchlab-upload-", dir=disk_folder()) as name:
        yield Path(name).resolve()


def _placed(files: Sequence[UploadFile], data: Sequence[UploadFile], data_folder: str) -> list[str]:
    """Return the path of each file in the job's folder. Raise UsageError if a path would leave the
    folder, or if two paths are equal."""
    paths = [PurePosixPath(_safe(file.filename or "")) for file in files]
    tops = {path.parts[0] for path in paths}
    if len(tops) == 1 and all(len(path.parts) > 1 for path in paths):
        # If a user chooses a folder, the browser prefixes each name with the folder's name.
        paths = [PurePosixPath(*path.parts[1:]) for path in paths]
    folder = PurePosixPath(_safe(data_folder))
    paths += [folder / _safe((one.filename or "").rpartition("/")[2]) for one in data]
    names = [str(path) for path in paths]
    if not names:
        raise UsageError("No file came along.", remedy="Choose the job's folder.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"Two of the files are {twice!r}.", remedy="Leave one of them out.")
    return names


def _safe(name: str) -> str:
    if problem := name_problem(name):
        raise UsageError(f"A file's name, {name[:200]!r}, {problem}.", remedy="Rename it, or leave it out.")
    return name


def _write(folder: Path, sources: Sequence[tuple[IO[bytes], str]]) -> None:
    try:
        for source, name in sources:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(source, file)
    except FileExistsError as error:
        raise UsageError(
            f"A file and a folder have the same name: {Path(str(error.filename)).name!r}.",
            remedy="Rename one of the two.",
        ) from error
    except NotADirectoryError as error:
        raise UsageError(
            f"A file and a folder have the same name, on the way to {name!r}.", remedy="Rename one of the two."
        ) from error
    except OSError as error:
        raise UsageError(
            f"The files cannot be kept by the manager: {error.strerror or error}.", remedy=_BY_HAND
        ) from error


def _job_file(names: Sequence[str], named: str) -> str:
    if named:
        if named in names:
            return named
        raise UsageError(f"No file {named!r} came along.", remedy=f"There are {_some(names)}.")
    found = [name for name in names if "/" not in name and name.endswith((".yaml", ".yml"))]
    for usual in ("job.yaml", "job.yml"):
        if usual in found:
            return usual
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            "None of the files is a job file: a YAML file at the top of the folder.",
            remedy=f"There are {_some(names)}. `batchlab init` writes a job to start from.",
        )
    raise UsageError(f"Any of {_some(found)} could be the job file.", remedy="Say which of them it is.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _loaded(path: Path, folder: Path, overrides: Mapping[str, str]) -> tuple[JobFile, tuple[bytes, str]]:
    from batchlab.jobs import job_file, submission

    try:
        _stay_inside(path)
        loaded = job_file.load(path, overrides)
    except JobFileError as error:
        raise _retold(error, folder) from error
    for one in (loaded.code, *(file for file in loaded.files if isinstance(file, Path))):
        if not one.resolve().is_relative_to(folder):
            raise _leaves(str(one))
    try:
        return loaded, submission.code_digest(loaded, MAX_CODE_BYTES)
    except UsageError as error:
        told = error.message.replace(str(folder), "that came along")
        raise UsageError(told, remedy=error.remedy) from error


def _stay_inside(path: Path) -> None:
    """Raise UsageError if the job file names a local path that is not below its folder. This check
    comes before any search for files, because a pattern may match a whole disk."""
    from batchlab.jobs import yaml_source
    from batchlab.jobs.schema import SHAPE

    document = yaml_source.parse(yaml_source.text_of(path, SHAPE.what, ""), lambda _: False)
    data = document.data if isinstance(document.data, dict) else {}
    given = data.get("input")
    files = given.get("files") if isinstance(given, dict) else None
    for name in [data.get("code"), *(files if isinstance(files, list) else [files])]:
        if isinstance(name, str) and "://" not in name:
            parts = name.replace("\\", "/").split("/")
            if name.startswith(("/", "~")) or ".." in parts:
                raise _leaves(name)


def _retold(error: JobFileError, folder: Path) -> JobFileError:
    """Return the error without the temporary folder's path, which the user does not know."""
    from batchlab.jobs.yaml_source import JobFileErrors

    return JobFileErrors(
        [
            JobFileError(
                one.message.replace(str(folder), "what came along"),
                file=one.file.removeprefix(f"{folder}/"),
                line=one.line,
                remedy=one.remedy.replace(str(folder), "what came along"),
            )
            for one in getattr(error, "errors", (error,))
        ]
    )


def _leaves(name: str) -> UsageError:
    return UsageError(
        f"The job file names {name!r}, which is not among the files that came along.",
        remedy="Send it along, and name it by its path from the job file.",
    )
