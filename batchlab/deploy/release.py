"""A release: one archive with everything that an instance needs to become a manager or a worker.

Invariant: its name is the SHA-256 of its content. The same code, packages, and target give the same
archive. An instance installs from the stack's bucket, not from a package index.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

from batchlab.core import package_data
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.ports import Objects
from batchlab.core.retry import Patience
from batchlab.deploy import wheelhouse
from batchlab.deploy.wheelhouse import Target
from batchlab.runtime import environment

SUFFIX = ".tar.gz"
PREFIX = "boot/"
"""Folder of releases in the stack's bucket. Its lifecycle rules do not delete them."""
DATABASE_CA = "database-ca.pem"
_MIB = 1024 * 1024


def build_release(
    folder: Path,
    *,
    architecture: str = "x86_64",
    python: str = "",
    packages: Sequence[str] = (),
    database_ca: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write `<folder>/<sha256>.tar.gz` for instances with the architecture and Python version, and
    return its path. An empty version means the running Python. The archive contains the PyPI
    `packages` of users' tasks, the certificates of the database, and `variables` for the
    environment of manager and workers. `say` receives progress messages.

    Raises BackendError if a package is not available, and UsageError for invalid arguments.
    """
    target = Target.of(architecture, python)
    with tempfile.TemporaryDirectory(prefix="batchlab-release-") as made:
        wheels = Path(made)
        say(f"Fetching the packages for {target}.")
        pins = wheelhouse.fetch(wheels, target, packages)
        wheelhouse.own_wheel(wheels)
        content = _boot_files()
        content["packages.txt"] = ("\n".join(pins) + "\n").encode()
        content["version"] = _version(target)
        if database_ca:
            content[DATABASE_CA] = _read(database_ca)
        if variables:
            content[environment.FILE] = environment.content(variables)
        content |= {f"wheels/{one.name}": one.read_bytes() for one in wheels.glob("*.whl")}
    path = _write(folder, content)
    size_mib = path.stat().st_size / _MIB
    say(f"The release {release_of(path)[:12]} has {len(pins) + 1} packages, {size_mib:.0f} MiB.")
    return path


def release_of(archive: Path) -> str:
    """Return the value of the stack's parameter `Release` from an archive's name."""
    return archive.name.removesuffix(SUFFIX)


def key_of(release: str) -> str:
    """Return the key of a release in the bucket."""
    return f"{PREFIX}{release}{SUFFIX}"


def upload(objects: Objects, archive: Path, patience: Patience, say: Callable[[str], None]) -> str:
    """Upload the archive to the stack's bucket unless it exists there, and return its key. Raises
    BackendError."""
    key, size = key_of(release_of(archive)), archive.stat().st_size

    async def put() -> None:
        known = await patience(partial(objects.head, key))
        if known and known.size == size:
            say(f"The release {release_of(archive)[:12]} is in the bucket already.")
            return
        say(f"Uploading the release {release_of(archive)[:12]}, {size / _MIB:.0f} MiB.")
        await patience(partial(objects.upload, key, archive))

    asyncio.run(put())
    return key


def _boot_files() -> dict[str, bytes]:
    root = package_data.folder("backends") / "aws" / "boot"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def _version(target: Target) -> bytes:
    """Return the shell variables that boot.sh reads."""
    lines = [
        f"VERSION={metadata.version('batchlab')}",
        f"PYTHON={target.python}",
        f"ARCHITECTURE={target.architecture}",
    ]
    return ("\n".join(lines) + "\n").encode()


def _read(certificates: Path) -> bytes:
    try:
        found = certificates.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{certificates} cannot be read: {error.strerror}.",
            remedy="Name a file that is there and can be read.",
        ) from error
    if b"-----BEGIN CERTIFICATE-----" not in found:
        raise UsageError(
            f"{certificates} does not contain certificates in PEM form.",
            remedy="Name the bundle that AWS publishes for RDS in the stack's region.",
        )
    return found


def _write(folder: Path, content: dict[str, bytes]) -> Path:
    packed = BytesIO()
    # Wheels are compressed already, and the compressor's version would change the archive.
    with (
        gzip.GzipFile("", "wb", compresslevel=0, fileobj=packed, mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name, body in sorted(content.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            entry.mode = 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(entry, BytesIO(body))
    whole = packed.getvalue()
    path = folder / f"{hashlib.sha256(whole).hexdigest()}{SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".new")
        staged.write_bytes(whole)
        staged.replace(path)
    except OSError as error:
        raise BackendError(
            f"The release cannot be written to {folder}: {error.strerror}.",
            remedy="Free some space, or name another folder.",
        ) from error
    return path
