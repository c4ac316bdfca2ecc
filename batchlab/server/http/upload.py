"""A form with files, streamed to the disk while it comes.

Invariant: whatever is sent, no file of it is in memory or open but the one that is coming, there is
room for all of it before the first byte is read, and a form that is closed has left nothing.
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
"""What nothing that is sent or fetched by HTTP takes of the manager's disk."""
LONGEST_FIELD = 64 * 1024
_ROOMY = "/var/tmp"  # noqa: S108 - a folder of our own is made in it, as in the usual one


def roomy() -> str:
    """The folder for what is large and soon gone. The usual one is memory on many systems."""
    said = tempfile.tempdir or any(name in os.environ for name in ("TMPDIR", "TEMP", "TMP"))
    usual = tempfile.gettempdir()
    return usual if said or not os.access(_ROOMY, os.W_OK | os.X_OK) else _ROOMY


def has_room(folder: Path | str, size_bytes: int) -> bool:
    """Whether so much more leaves of the disk what must stay free."""
    return shutil.disk_usage(folder).free - size_bytes >= KEPT_FREE_BYTES


async def form_with_files(
    request: Request, size_bytes: int, *, max_files: int, max_fields: int, remedy: str
) -> FormData:
    """The request's form, to be closed; `size_bytes` is what it says that it brings. UsageError
    where there is no room for that."""
    # Twice: what came is packed and copied before it goes.
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
    # For one that nobody closes, such as one that was refused.
    weakref.finalize(form, shutil.rmtree, folder, ignore_errors=True)
    return form


class _Parser(MultiPartParser):
    """Starlette's, which keeps files in memory, or open, until it has read all of them."""

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
    """A file of a form. It is open while it is written to, and from the first read to the next
    `seek`; closed it is gone, and with the last one its folder."""

    _rolled = False
    """What is small is written at once: the disk's cache is not worth a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: IO[bytes] | None = None
        self._size_bytes = 0
        path.touch()

    def write(self, data: bytes) -> int:
        # Many of a form's files may come in one piece, and are all written before one is ended.
        with self._path.open("ab") as file:
            self._size_bytes += file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._size_bytes

    def read(self, size: int = -1) -> bytes:
        self._open = self._open or self._path.open("rb")
        return self._open.read(size)

    def seek(self, offset: int) -> int:
        """Back to its beginning, the only place that forms go to."""
        assert offset == 0
        self._shut()
        return 0

    def close(self) -> None:
        self._shut()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # there are others in it
            self._path.parent.rmdir()

    def _shut(self) -> None:
        if self._open:
            self._open.close()
            self._open = None
