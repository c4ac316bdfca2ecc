"""Endpoint that accepts a form with a job file, its code, and its data.

Invariant: the endpoint reads and writes only inside temporary folders of the request, and removes these folders after
the request. The names of the uploaded files and the contents of the job file cannot make the endpoint read or write
other folders. The endpoint writes the files of a form to disk while the files arrive, and does not keep the files in
memory. The disk must have room for the whole form before the endpoint reads the first byte.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from batchlab.core import api_types
from batchlab.core.errors import JobFileError, UsageError
from batchlab.core.job_definition import Dependency
from batchlab.core.protocol import object_keys
from batchlab.core.task_context import name_problem
from batchlab.core.text import first_of, size
from batchlab.core.users import Caller
from batchlab.manager.manager import Manager
from batchlab.server.answers import accept, check_share, current_view
from batchlab.server.http.common import CallerDep, Leader, guarded_router

if TYPE_CHECKING:
    from batchlab.jobs.job_file import JobFile

MIN_FREE_BYTES = 512 * 1024**2
"""Free space in bytes that uploads and downloads leave on the manager's disk."""
MAX_FIELD_BYTES = 64 * 1024
_DISK_FOLDER = "/var/tmp"  # noqa: S108 - mkdtemp creates a private folder below


def disk_folder() -> str:
    """Return the folder for large temporary files. The default temporary folder of many systems is in memory."""
    is_configured = tempfile.tempdir or any(name in os.environ for name in ("TMPDIR", "TEMP", "TMP"))
    default = tempfile.gettempdir()
    return default if is_configured or not os.access(_DISK_FOLDER, os.W_OK | os.X_OK) else _DISK_FOLDER


def has_room(folder: Path | str, size_bytes: int) -> bool:
    """Return whether MIN_FREE_BYTES stay free on the folder's disk after `size_bytes` more bytes are written."""
    return shutil.disk_usage(folder).free - size_bytes >= MIN_FREE_BYTES


async def form_with_files(
    request: Request, size_bytes: int, *, max_files: int, max_fields: int, remedy: str
) -> FormData:
    """Return the request's form, which the caller closes. `size_bytes` is the declared size of the request. Raise
    UsageError if the disk does not have room for the form.
    """
    # The disk needs twice the size of the form, because the manager copies and packs the files before the manager
    # removes the upload.
    if not has_room(disk_folder(), 2 * size_bytes):
        raise UsageError(f"The manager's disk is too full for an upload of {size(size_bytes)}.", remedy=remedy)
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
    # A finalizer also removes the files of a form that is never closed, for example after a refused request.
    weakref.finalize(form, shutil.rmtree, folder, ignore_errors=True)
    return form


class _Parser(MultiPartParser):
    """Form parser that writes the files to `folder`. Starlette's parser keeps all files of a form in memory or open."""

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
    """File of a form.

    The file on disk is open during a write, and from the first read until the next `seek`. The method `close` deletes
    the file, and also deletes the folder if the folder is then empty.
    """

    _rolled = False
    """Attribute of a file that Starlette reads.

    If `_rolled` is False, Starlette writes to the file without a thread, which is faster for small writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: IO[bytes] | None = None
        self._size_bytes = 0
        path.touch()

    def write(self, data: bytes) -> int:
        # The file is open only during a write, because Starlette may write many files of one received block before
        # Starlette closes the first file.
        with self._path.open("ab") as file:
            self._size_bytes += file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._size_bytes

    def read(self, size: int = -1) -> bytes:
        self._open = self._open or self._path.open("rb")
        return self._open.read(size)

    def seek(self, offset: int) -> int:
        """Set the position in the file to the start of the file, which is the only position that Starlette's forms
        use.
        """
        assert offset == 0
        self._shut()
        return 0

    def close(self) -> None:
        self._shut()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # rmdir fails while the folder contains other files
            self._path.parent.rmdir()

    def _shut(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


router = guarded_router()

MAX_BYTES = 1024**3
"""Limit of one upload in bytes. `batchlab job submit` stores larger data directly in the bucket."""
MAX_CODE_BYTES = 64 * 1024**2
"""Limit in bytes of the code in an upload, because the manager packs the code in memory."""
MAX_FILES = 5000
MAX_FIELDS = 200
_UPLOAD_NAME = "the uploaded folder"
"""Text that replaces the path of a temporary folder in errors."""

_REMEDY = "Use `batchlab job submit`, which has no limit."
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
                            "description": "The files in the job's folder. The name of a file is its path. A top-level "
                            "folder that contains all files is removed from the paths.",
                        },
                        "data": {**_FILES, "description": "More files, which are stored in `data_folder`."},
                        "data_folder": {**_TEXT, "default": "data"},
                        "job_file": {
                            **_TEXT,
                            "description": "The path of the job file. The default is the only YAML file at the top.",
                        },
                        "set": {
                            "type": "array",
                            "items": _TEXT,
                            "description": "KEY=VALUE: replaces the default of a parameter.",
                        },
                        "after": {
                            "type": "array",
                            "items": _TEXT,
                            "description": "ID[:succeeded|ended]: an earlier job that the job waits for.",
                        },
                        "share": {**_TEXT, "description": "Share that replaces the share of the job file."},
                        "token": {
                            **_TEXT,
                            "description": "The client token. A repeated request with the same token creates no job.",
                        },
                    },
                    "required": ["files"],
                }
            }
        },
    }
}


# --- Submission with files ------------------------------------------------------------------------


@router.post("/jobs/files", status_code=201, openapi_extra=_UPLOAD)
async def submit_files(manager: Leader, caller: CallerDep, request: Request) -> api_types.JobView:
    """Submit a job file with its code and data, as files of a form."""
    size_bytes = check_length(request.headers.get("content-length"))
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise UsageError(
            f"The content type of a job's files must be multipart/form-data, but is {kind or 'missing'}.",
            remedy="Send the files for example with curl -F 'files=@job.yaml'.",
        )
    form = await read_form(request, size_bytes)
    try:
        return await submit_form(manager, form, caller)
    finally:
        await form.close()


async def read_form(request: Request, size_bytes: int) -> FormData:
    """Return the form with a job's files. The caller must close the form."""
    return await form_with_files(request, size_bytes, max_files=MAX_FILES, max_fields=MAX_FIELDS, remedy=_REMEDY)


def check_length(text: str | None, most: int = MAX_BYTES, *, remedy: str = _REMEDY) -> int:
    """Return the length of a request body in bytes. Raise UsageError if the length is missing or above `most`."""
    if text is None or not (text.isascii() and text.isdigit()):
        raise UsageError("The request does not have a valid Content-Length.", remedy="Send the header Content-Length.")
    if int(text) > most:
        raise UsageError(f"The request is larger than the limit of {most / 2**20:,.0f} MiB.", remedy=remedy)
    return int(text)


async def submit_form(manager: Manager, form: FormData, caller: Caller) -> api_types.JobView:
    """Submit the job that the files of the form define, for a user. The manager does not run the code of the job."""
    from batchlab.jobs import submission

    files, data = _files_of(form, "files"), _files_of(form, "data")
    overrides = _overrides(str(text) for text in form.getlist("set"))
    data_folder = _field(form, "data_folder") or "data"
    token = _field(form, "token") or secrets.token_urlsafe(16)
    with tempfile.TemporaryDirectory(prefix="batchlab-upload-", dir=disk_folder()) as temporary:
        folder = Path(await asyncio.to_thread(os.path.realpath, temporary))
        names = _paths(files, data, data_folder)
        sources: list[tuple[IO[bytes], str]] = [
            (upload.file, name) for upload, name in zip([*files, *data], names, strict=True)
        ]
        await asyncio.to_thread(_write, folder, sources)
        path = folder / _job_file(names[: len(files)], _field(form, "job_file"))
        jobfile, packed = await asyncio.to_thread(_load, path, folder, overrides)
        share = _field(form, "share") or jobfile.job.share or ""
        if share:  # the check comes before the upload to the bucket
            await check_share(manager, object_keys.job_id(jobfile.job.name, token), share)
        ports = manager.ports
        job = await submission.prepare(
            jobfile, objects=ports.objects, clock=ports.clock, patience=ports.patience, token=token, packed=packed
        )
    after = tuple(Dependency.parse(str(text)) for text in form.getlist("after") if str(text).strip())
    job = replace(job, after=after, share=share)
    written = await accept(manager, job, None, caller)
    return await current_view(manager, written.rows.id)


def _files_of(form: FormData, name: str) -> list[UploadFile]:
    """Return the files of one field of the form.

    Empty files without a name are skipped, because a browser sends an empty file without a name if the user did not
    choose a file.
    """
    return [item for item in form.getlist(name) if isinstance(item, UploadFile) and (item.filename or item.size)]


def _field(form: FormData, name: str) -> str:
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""


def _overrides(texts: Iterable[str]) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for text in filter(None, map(str.strip, texts)):
        key, equals, value = text.partition("=")
        if not (equals and key):
            raise UsageError(f"{text!r} is not KEY=VALUE.", remedy="Write for example year=2026.")
        overrides[key] = value
    return overrides


def _paths(files: Sequence[UploadFile], data: Sequence[UploadFile], data_folder: str) -> list[str]:
    """Return the path of each file in the job's folder.

    Raise UsageError if a file's path would leave the job's folder, or if two paths are equal.
    """
    paths = [PurePosixPath(_safe(file.filename or "")) for file in files]
    tops = {path.parts[0] for path in paths}
    if len(tops) == 1 and all(len(path.parts) > 1 for path in paths):
        # If a user chooses a folder, the browser adds the folder's name to the path of each file.
        paths = [PurePosixPath(*path.parts[1:]) for path in paths]
    folder = PurePosixPath(_safe(data_folder))
    paths += [folder / _safe((upload.filename or "").rpartition("/")[2]) for upload in data]
    names = [str(path) for path in paths]
    if not names:
        raise UsageError("The form does not contain files.", remedy="Choose the job's folder.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"Two files have the path {twice!r}.", remedy="Leave out one of these files.")
    return names


def _safe(name: str) -> str:
    if problem := name_problem(name):
        raise UsageError(f"The file name {name[:200]!r} {problem}.", remedy="Rename the file, or leave it out.")
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
            f"A file and a folder have the same name in the path {name!r}.", remedy="Rename the file or the folder."
        ) from error
    except OSError as error:
        raise UsageError(f"The manager cannot store the files: {error.strerror or error}.", remedy=_REMEDY) from error


def _job_file(names: Sequence[str], requested: str) -> str:
    if requested:
        if requested in names:
            return requested
        raise UsageError(f"The form has no file {requested!r}.", remedy=f"The form has {first_of(names, 3)}.")
    candidates = [name for name in names if "/" not in name and name.endswith((".yaml", ".yml"))]
    for usual in ("job.yaml", "job.yml"):
        if usual in candidates:
            return usual
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UsageError(
            "The form does not contain a job file, which is a YAML file at the top of the folder.",
            remedy=f"The form has {first_of(names, 3)}. `batchlab init` writes an example of a job.",
        )
    raise UsageError(f"Each of {first_of(candidates, 3)} may be the job file.", remedy="Set `job_file` to one of them.")


def _load(path: Path, folder: Path, overrides: Mapping[str, str]) -> tuple[JobFile, tuple[bytes, str]]:
    from batchlab.jobs import job_file, submission

    try:
        _check_paths(path)
        loaded = job_file.load(path, overrides)
    except JobFileError as error:
        raise _without_folder(error, folder) from error
    for local in (loaded.code, *(file for file in loaded.files if isinstance(file, Path))):
        if not local.resolve().is_relative_to(folder):
            raise _not_uploaded(str(local))
    try:
        return loaded, submission.code_digest(loaded, MAX_CODE_BYTES)
    except UsageError as error:
        raise UsageError(error.message.replace(str(folder), _UPLOAD_NAME), remedy=error.remedy) from error


def _check_paths(path: Path) -> None:
    """Raise UsageError if the job file names a local path that is not below the job file's folder.

    The check of the paths comes before the search for files, because a pattern may match a whole disk.
    """
    from batchlab.jobs import yaml_source
    from batchlab.jobs.schema import SHAPE

    document = yaml_source.parse(yaml_source.text_of(path, SHAPE.what, ""), lambda _: False)
    data = document.data if isinstance(document.data, dict) else {}
    source = data.get("input")
    files = source.get("files") if isinstance(source, dict) else None
    for name in [data.get("code"), *(files if isinstance(files, list) else [files])]:
        if isinstance(name, str) and "://" not in name:
            parts = name.replace("\\", "/").split("/")
            if name.startswith(("/", "~")) or ".." in parts:
                raise _not_uploaded(name)


def _without_folder(error: JobFileError, folder: Path) -> JobFileError:
    """Return the error without the path of the temporary folder, which the user does not know."""
    from batchlab.jobs.yaml_source import JobFileErrors

    return JobFileErrors(
        [
            JobFileError(
                mistake.message.replace(str(folder), _UPLOAD_NAME),
                file=mistake.file.removeprefix(f"{folder}/"),
                line=mistake.line,
                remedy=mistake.remedy.replace(str(folder), _UPLOAD_NAME),
            )
            for mistake in getattr(error, "errors", (error,))
        ]
    )


def _not_uploaded(name: str) -> UsageError:
    return UsageError(
        f"The job file names {name!r}, which is not among the uploaded files.",
        remedy="Upload the file, and write its path relative to the job file.",
    )
