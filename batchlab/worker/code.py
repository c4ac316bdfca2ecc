"""The user's code as a zip that is named by its content: packed, verified, unpacked.

Invariant: the same folder packs to the same bytes, and a folder of unpacked code is either absent
or complete and exactly what its digest says. Nothing in a zip can write outside of that folder.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from batchlab.errors import UsageError
from batchlab.protocol import naming

MAX_BYTES = 512 * 1024 * 1024
MAX_FILES = 20_000

_SKIPPED = frozenset(
    {"__pycache__", ".git", ".venv", ".batchlab", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
_MARKS = ("pyvenv.cfg", naming.MADE)
"""Files by which a virtual environment, a grid's home and fetched results are known: whatever
they are called, they would change a job's code with every run."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1024 * 1024


def key(data: bytes) -> str:
    """The object key of a code zip."""
    return f"code/{hashlib.sha256(data).hexdigest()}.zip"


def digest_of(code_key: str) -> str:
    """The digest that a code zip's key promises; UsageError where it is no such key."""
    digest = code_key.removeprefix("code/").removesuffix(".zip")
    if (
        code_key != f"code/{digest}.zip"
        or len(digest) != 64
        or set(digest) - set("0123456789abcdef")
    ):
        raise UsageError(f"{code_key!r} is no key of a code zip.")
    return digest


def pack(folder: Path, data: Collection[Path] = ()) -> bytes:
    """The files of `folder` as a zip, the same for the same content and modes.

    Caches, virtual environments, version control and folders that batchlab made stay out, and so
    does `data` (absolute paths): the job's input, which reaches the tasks by itself.
    UsageError for a link that leaves the folder, for what is neither file nor folder, and beyond
    512 MiB or 20,000 files.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise UsageError(f"The code folder {folder} does not exist.")
    left_out = {path.resolve() for path in data}
    files = [path for path in _files(root, root) if path not in left_out]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    total = sum(path.stat().st_size for path in files)
    if len(files) > MAX_FILES or total > MAX_BYTES:
        raise UsageError(
            f"The code folder {folder} holds {len(files)} files, {total / 2**20:.0f} MiB; "
            f"the limits are {MAX_FILES} and {MAX_BYTES / 2**20:.0f} MiB.",
            remedy="Keep data out of it: data is the job's input.",
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            info = zipfile.ZipInfo(path.relative_to(root).as_posix(), _EPOCH)
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            info.create_system = 3  # Unix, whatever it is packed on
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, path.read_bytes())
    return buffer.getvalue()


def _files(folder: Path, root: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in _SKIPPED or any((path / mark).is_file() for mark in _MARKS):
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            raise UsageError(
                f"{path} is a link that leaves the code folder, or leads to a folder.",
                remedy="Put the files themselves there.",
            )
        if path.is_dir():
            yield from _files(path, root)
        elif path.is_file():
            yield path
        else:
            raise UsageError(f"{path} is neither a file nor a folder.", remedy="Delete it.")


def unpack(data: bytes, digest: str, target: Path) -> None:
    """Make `target` hold the zip's files, or leave it alone where it exists already.

    Any number of processes may do so at once. UsageError where `data` does not have that digest,
    is no zip, is too large unpacked, or names anything outside of its folder.
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
    except zipfile.BadZipFile as error:
        raise UsageError(f"The code zip cannot be read: {error}.") from error
    except OSError:
        if not target.is_dir():
            raise
        # Another process was faster: what is there has the same digest.
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # gone already, unless something failed above


def _extract(data: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_FILES:
            raise UsageError(f"The code zip holds {len(entries)} files; the limit is {MAX_FILES}.")
        left = MAX_BYTES
        for entry in entries:
            target = folder / _safe(entry)
            if entry.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            if target.exists():
                raise UsageError(f"The code zip names {entry.filename!r} twice.")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("xb") as file:
                left = _copy(source, file, left)
            target.chmod(0o755 if entry.external_attr >> 16 & stat.S_IXUSR else 0o644)


def _safe(entry: zipfile.ZipInfo) -> PurePosixPath:
    name = PurePosixPath(entry.filename)
    mode = entry.external_attr >> 16
    if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in name.parts[:1]:
        raise UsageError(f"The code zip names {entry.filename!r}, which leaves its folder.")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UsageError(f"The code zip holds {entry.filename!r}, which is a link or a device.")
    return name


def _copy(source: IO[bytes], file: IO[bytes], left: int) -> int:
    """Copies, counting what really comes out: the sizes in a zip's directory may lie."""
    while chunk := source.read(_CHUNK):
        left -= len(chunk)
        if left < 0:
            raise UsageError(f"The code zip unpacks to more than {MAX_BYTES / 2**20:.0f} MiB.")
        file.write(chunk)
    return left
