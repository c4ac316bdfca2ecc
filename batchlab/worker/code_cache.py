"""Code zips of users, named by their content, and the cache of code and shared values on an instance.

Invariants: the same folder always packs to the same bytes. A folder of unpacked code is either absent or complete, and
the content of the folder matches its digest. No entry of a zip can write outside the folder of its code. Missing or
damaged code fails the job with a reason. An unavailable object store raises BackendError, and does not fail the job.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO
from weakref import WeakValueDictionary

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.ports import Objects
from batchlab.core.protocol import object_keys
from batchlab.core.service_settings import VALUE_CACHE_BYTES
from batchlab.worker.handlers import Problem
from batchlab.worker.inflight_message import Scratch
from batchlab.worker.materialization import OffLoop

MAX_BYTES = 512 * 1024 * 1024
MAX_FILES = 20_000
MAX_CACHED_FILES = 4096
"""Limit of the functions and shared values in the cache of a worker, which also limits the worker's memory."""

_SKIPPED = frozenset({"__pycache__", ".git", ".venv", ".batchlab", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
_MARKS = ("pyvenv.cfg", object_keys.MADE)
"""Names of files that mark a virtual environment, a grid's home folder, or a folder of fetched results.

Folders with a marker file are not packed, because their content would change a job's code with every run.
"""
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)
"""Errors that zipfile raises for a zip that is damaged, encrypted, or packed by an unknown method."""
_BAD_NAMES = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EILSEQ, None)
"""OSErrors that a bad zip causes: conflicting names, names that are too long, and bad bz2 data (no errno).

All other OSErrors are problems of the machine.
"""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1024 * 1024


def key(data: bytes) -> str:
    """Return the object key for the bytes of a code zip."""
    return object_keys.code(hashlib.sha256(data).hexdigest())


def digest_of(code_key: str) -> str:
    """Return the digest in the key of a code zip. A key of any other form raises UsageError."""
    digest = code_key.removeprefix("code/").removesuffix(".zip")
    if code_key != object_keys.code(digest) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UsageError(f"{code_key!r} is not the key of a code zip.")
    return digest


def pack(folder: Path, data: Collection[Path] = (), most_bytes: int | None = None) -> bytes:
    """Pack the files of `folder` as a zip. The same content and file modes give the same bytes.

    The zip omits caches, virtual environments, version control, and folders made by batchlab. The zip also omits the
    input files of the job (`data`, absolute paths), because tasks receive input separately.

    Raise UsageError for a link that leaves the folder, a special or unreadable file, or a name that workers cannot
    unpack. Raise UsageError for more than 20,000 files, or for more than `most_bytes` (by default 512 MiB).
    """
    root = folder.resolve()
    if not root.is_dir():
        raise UsageError(
            f"The code folder {folder} does not exist.", remedy="Name the folder that contains the job's code."
        )
    excluded = {path.resolve() for path in data}
    try:
        files = select_files(folder, root, excluded, most_bytes or MAX_BYTES)
        return pack_files({path.relative_to(root).as_posix(): path for path in files})
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be read: {error.strerror}.",
            remedy="Make it readable, or move it out of the code folder.",
        ) from error


def pack_files(files: Mapping[str, Path]) -> bytes:
    """Return a zip of the files, by the name in the zip. The same content and file modes give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            # The zip always names Unix as its system, so that all platforms produce equal bytes.
            info.create_system = 3
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, path.read_bytes())
    return buffer.getvalue()


def select_files(
    folder: Path, root: Path, excluded: Collection[Path], most_bytes: int, *, package: str = ""
) -> list[Path]:
    """Return the files to pack, sorted by name. Raise UsageError for files that workers cannot unpack.

    If the folder is a package that a function imports, `package` is its name. Broken links in a package are omitted,
    because editors create them as locks.
    """
    files: list[Path] = []
    total = 0
    for path in _files(root, root, package):
        if path not in excluded:
            files.append(path)
            total += path.stat().st_size
        # The limits are checked during the walk, because the folder may be a whole disk.
        if len(files) > MAX_FILES or total > most_bytes:
            raise UsageError(
                f"The code folder {folder} is too large: "
                f"the limits are {MAX_FILES} files and {most_bytes / 2**20:.0f} MiB.",
                remedy="Move data out of it, and pass the data as a File."
                if package
                else "Move data out of it and declare the data as the job's input.",
            )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _files(folder: Path, root: Path, package: str) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in _SKIPPED or any((path / mark).is_file() for mark in _MARKS):
            continue
        if package and path.is_symlink() and not path.exists():
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            raise UsageError(
                f"{path} is a link out of the code folder, a link to a folder, or a broken link.",
                remedy=f"Remove the link from the package {package}, which the function imports."
                if package
                else "Replace it with the files, or name another folder in 'code'.",
            )
        if not _is_portable(path.name):
            raise UsageError(
                f"{str(path)!r} has a backslash in its name, or its name is not UTF-8.",
                remedy="Rename it." if package else "Rename it, or name another folder in 'code'.",
            )
        if path.is_dir():
            yield from _files(path, root, package)
        elif path.is_file():
            yield path
        else:
            raise UsageError(f"{path} is neither a file nor a folder.", remedy="Delete it.")


def _is_portable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\\" not in name


def unpack(data: bytes, digest: str, target: Path) -> None:
    """Unpack a code zip into the folder `target`, unless `target` exists.

    Several processes may unpack the same zip at the same time. Raise UsageError if `data` does not match `digest`, is
    not a zip, or is too large when unpacked. Raise UsageError if the zip contains a name outside its folder.
    """
    if target.is_dir():
        return
    if hashlib.sha256(data).hexdigest() != digest:
        raise UsageError("The code zip is damaged: its content does not match its name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}-", dir=target.parent))
    try:
        _extract(data, staged)
        staged.chmod(0o755)
        staged.rename(target)
    except _BAD_ZIP as error:
        raise UsageError(f"The code zip cannot be read: {error}.") from error
    except OSError as error:
        # If `target` exists after a failed rename, another process has unpacked the same digest.
        if not target.is_dir():
            if error.errno in _BAD_NAMES:
                raise UsageError(f"The code zip cannot be unpacked: {error.strerror or error}.") from error
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # The staging folder exists only after a failure.


def _extract(data: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_FILES:
            raise UsageError(f"The code zip has {len(entries)} files; the limit is {MAX_FILES}.")
        remaining = MAX_BYTES
        for entry in entries:
            target = folder / _safe(entry)
            if entry.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            if target.exists():
                raise UsageError(f"The code zip names {entry.filename!r} twice.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("xb") as file:
                remaining = _copy(source, file, remaining)
            target.chmod(0o755 if entry.external_attr >> 16 & stat.S_IXUSR else 0o644)


def _safe(entry: zipfile.ZipInfo) -> PurePosixPath:
    name = PurePosixPath(entry.filename)
    mode = entry.external_attr >> 16
    if not name.name or name.is_absolute() or ".." in name.parts or "\\" in entry.filename:
        raise UsageError(f"The code zip names {entry.filename!r}, which is outside its folder.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UsageError(f"The code zip has {entry.filename!r}, which is a link or a device.")
    return name


def _copy(source: IO[bytes], file: IO[bytes], remaining: int) -> int:
    """Copy a file, and return the remaining limit in bytes.

    The copied bytes are counted, because the sizes in a zip's directory may be wrong.
    """
    while chunk := source.read(_CHUNK):
        remaining -= len(chunk)
        if remaining < 0:
            raise UsageError(f"The code zip unpacks to more than {MAX_BYTES / 2**20:.0f} MiB.")
        file.write(chunk)
    return remaining


class CodeCache:
    """Code folders, pickled functions, and shared values of a worker's jobs, each fetched once per instance.

    Functions and shared values together are at most MAX_CACHED_FILES files with `max_file_bytes`, apart from the files
    that executions use. The files that were used least recently are removed, and fetched again if needed.
    """

    def __init__(
        self, objects: Objects, scratch: Scratch, off_loop: OffLoop, max_file_bytes: int = VALUE_CACHE_BYTES
    ) -> None:
        self._objects = objects
        self._scratch = scratch
        self._off_loop = off_loop
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """Locks of the objects that are being fetched."""
        self._max_file_bytes = max_file_bytes
        self._files: OrderedDict[Path, int] = OrderedDict()
        """Files of functions and shared values, and their sizes in bytes. The last entry was used last."""
        self._used_functions: dict[Path, Path] = {}
        """File of the function that each execution uses, by the folder of the execution."""
        self._total_bytes = 0

    async def code(self, key: str | None) -> tuple[str, Path | None]:
        """Return the digest and the unpacked folder of a code zip, or ("", None) for a job without code.

        A missing or damaged zip raises Problem of kind "import".
        """
        if key is None:
            return "", None
        try:
            digest = digest_of(key)
            folder = self._scratch.code(digest)
            async with self._lock(key):
                if not folder.is_dir():
                    data = await self._objects.get(key)
                    await self._off_loop(unpack, data, digest, folder)
        except (NotFound, UsageError) as error:
            raise Problem("import", f"The job's code cannot be fetched: {error}") from error
        return digest, folder

    def cached_function(self, key: str, folder: Path) -> Path | None:
        """Return the file of a pickled function as `function` does, or None if the cache does not contain it."""
        path = self._path(key, "functions")
        return self._lend(path, folder) if path in self._files else None

    async def function(self, key: str, folder: Path) -> Path:
        """Return the file of a pickled function, which is fetched on first use, for the execution in `folder`.

        The path is the same for all executions, so that a child loads the function once. The cache does not remove the
        file before `release_function`. A missing object raises Problem of kind "import".
        """
        try:
            path = await self._fetch(key, "functions")
        except NotFound as error:
            raise Problem("import", f"The job's function cannot be fetched: {error}") from error
        return self._lend(path, folder)

    def release_function(self, folder: Path) -> None:
        """Allow the removal of the function that the execution in `folder` has used."""
        self._used_functions.pop(folder, None)

    async def link_value(self, key: str, target: Path) -> None:
        """Link the file of a shared value to `target`. The file is fetched on first use.

        A missing object raises NotFound.
        """
        self._link(await self._fetch(key, "values"), target)

    def evict_unused(self) -> None:
        """Remove all functions and shared values that no execution uses."""
        self._evict(0, 0)

    def _lend(self, path: Path, folder: Path) -> Path:
        self._used_functions[folder] = path
        self._touch(path)
        return path

    def _link(self, path: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(path)
        self._touch(path)

    def _touch(self, path: Path) -> None:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = path.stat().st_size
            self._total_bytes += self._files[path]
        self._evict(self._max_file_bytes, MAX_CACHED_FILES)

    def _evict(self, max_bytes: int, max_files: int) -> None:
        if self._total_bytes <= max_bytes and len(self._files) <= max_files:
            return
        used = set(self._used_functions.values())
        for path in tuple(self._files):
            # The removal of a linked file does not free any space.
            if path in used or (path.exists() and path.stat().st_nlink > 1):
                continue
            path.unlink(missing_ok=True)
            self._total_bytes -= self._files.pop(path)
            if self._total_bytes <= max_bytes and len(self._files) <= max_files:
                return

    def _path(self, key: str, folder: str) -> Path:
        return self._scratch.root / folder / hashlib.sha256(key.encode()).hexdigest()

    async def _fetch(self, key: str, folder: str) -> Path:
        path = self._path(key, folder)
        async with self._lock(key):
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                await self._objects.download(key, path)
        return path

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())
