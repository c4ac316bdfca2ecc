"""Forms with files, written to disk while they arrive.

Invariant: no file of a form is kept in memory, and at most the file that arrives is open. Before
the first byte is read, the disk must have room for the whole form. A closed form leaves no files.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from fastapi import Request
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from batchlab.core.errors import UsageError
from batchlab.core.text import size

KEPT_FREE_BYTES = 512 * 1024**2
"""Free space on the manager's disk that uploads and downloads never use, in bytes."""
LONGEST_FIELD = 64 * 1024
_ROOMY = "/var/tmp"  # noqa: S108 - mkdtemp creates a folder in it


def roomy() -> str:
    """Return the folder for large temporary files. On many systems, the default temporary folder is
    in memory."""
    said = tempfile.tempdir or any(name in os.environ for name in ("TMPDIR", "TEMP", "TMP"))
    usual = tempfile.gettempdir()
    return usual if said or not os.access(_ROOMY, os.W_OK | os.X_OK) else _ROOMY


def has_room(folder: Path | str, size_bytes: int) -> bool:
    """Return whether KEPT_FREE_BYTES stay free after `size_bytes` more are written."""
    return shutil.disk_usage(folder).free - size_bytes >= KEPT_FREE_BYTES


async def form_with_files(
    request: Request, size_bytes: int, *, max_files: int, max_fields: int, remedy: str
) -> FormData:
    """Return the request's form, which the caller closes. `size_bytes` is the declared size of the
    request. Raise UsageError if the disk does not have room for it."""
    # Twice the size, because the manager copies and packs the upload before it removes it.
    if not has_room(roomy(), 2 * size_bytes):
        raise UsageError(
            f"The manager's disk has no room for {size(size_bytes)} that are sent to it.",
            remedy=remedy,
        )
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="batchlab-form-", dir=roomy()))
    parser = _Parser(
        request.headers,
        request.stream(),
        max_files=max_files,
        max_fields=max_fields,
        max_part_size=LONGEST_FIELD,
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
