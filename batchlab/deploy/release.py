"""Release archive, which contains everything that an instance needs to become a manager or a worker.

Invariants: the name of a release is the SHA-256 of its content. Releases of the same code, packages, and target are
identical. An instance installs a release from the stack's bucket, without a package index. If a package is installed on
this machine, instances get the same version of the package, so instances run tested versions.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from io import BytesIO
from pathlib import Path
from types import MappingProxyType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from batchlab.adapters.local.ministack import pip_reason
from batchlab.core import installation
from batchlab.core.errors import BackendError, UsageError
from batchlab.core.port_retries import Patience
from batchlab.core.ports import Objects
from batchlab.deploy.database_ca import read as read_bundle
from batchlab.runtime import compose_project, descriptor

ARCHITECTURES = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13")
"""Python versions that batchlab supports and that Amazon Linux 2023 offers."""
INSTALLER = "pip==25.3"
"""Package that installs the wheels of a release on an instance, because the Python of an instance may lack pip."""

_GLIBC = 34
"""Minor version of glibc on Amazon Linux 2023, which has glibc 2.34."""
_OLDEST_GLIBC = 5
_MISSING = re.compile(r"No matching distribution found for (\S+)")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Earliest time that a zip file can store. Each file of a wheel gets the time `_EPOCH`, so that wheels are
reproducible.
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Architecture and Python version, such as "3.12", of the instances that install a release."""

    architecture: str
    python: str

    @classmethod
    def of(cls, architecture: str, python: str) -> Target:
        """Return the Target for an architecture and a Python version. If `python` is "", use the version of the running
        Python.

        Raise UsageError for a Python version or an architecture that instances do not support.
        """
        # batchlab sends functions as bytecode, so instances need the Python version of the sender.
        python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
        if architecture not in ARCHITECTURES:
            raise UsageError(
                f"The architecture {architecture!r} is not supported.",
                remedy=f"Name one of {', '.join(ARCHITECTURES)}.",
            )
        if python not in PYTHONS:
            raise UsageError(f"Instances do not run Python {python}.", remedy=f"Name one of {', '.join(PYTHONS)}.")
        return cls(architecture, python)

    def __str__(self) -> str:
        return f"Python {self.python} on {self.architecture}"

    def markers(self) -> dict[str, str]:
        """Return the variables with which the environment markers of package requirements are evaluated."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.architecture,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }

    def pip(self) -> list[str]:
        """Return the options with which pip selects wheels for the target."""
        # With an explicit platform, pip ignores wheels for an older glibc, so the options name all supported platforms.
        names = [f"manylinux_2_{minor}" for minor in range(_GLIBC, _OLDEST_GLIBC - 1, -1)]
        names += ["manylinux2014", "manylinux2010", "manylinux1", "linux"]
        platforms = [f"--platform={name}_{self.architecture}" for name in names]
        options = ("--only-binary=:all:", "--no-deps", "--implementation=cp", f"--python-version={self.python}")
        return [*options, *platforms]


def own_wheel(folder: Path) -> Path:
    """Write batchlab's wheel from the files and metadata of the running package, and return the path of the wheel."""
    installed = metadata.distribution("batchlab")
    version = installed.version
    info = f"batchlab-{version}.dist-info"
    content = {name: path.read_bytes() for name, path in installation.files()}
    content |= {
        file.as_posix(): file.read_binary() for file in installed.files or () if file.parts[:2] == (info, "licenses")
    }
    content[f"{info}/METADATA"] = (installed.read_text("METADATA") or "").encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: batchlab\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{info}/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    record = [f"{name},{_digest(body)},{len(body)}" for name, body in sorted(content.items())]
    record.append(f"{info}/RECORD,,\n")
    content[f"{info}/RECORD"] = "\n".join(record).encode()
    path = folder / f"batchlab-{version}-py3-none-any.whl"
    # The wheel is not compressed, because the output of a compression library differs between the library's versions.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for name, body in content.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, body)
    return path


def _digest(body: bytes) -> str:
    encoded = base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=")
    return f"sha256={encoded.decode()}"


def fetch(folder: Path, target: Target, packages: Sequence[str] = ()) -> list[str]:
    """Download the wheels of batchlab's dependencies and of `packages` from pip's configured index.

    Return the downloaded packages as "name==version". Raise BackendError with pip's reason if a download fails, and
    UsageError for an invalid package name.
    """
    with _Pip(target, folder) as pip:
        pins, missing = _closure([*compose_project.requirements(), *packages], target, pip)
        pip.download([*pins, INSTALLER])
    return sorted([*pins, *missing, INSTALLER])


def _closure(roots: Sequence[str], target: Target, pip: _Pip) -> tuple[Sequence[str], Sequence[str]]:
    """Return the pins of all required packages as two lists: packages that are installed on this machine, and packages
    that the function has downloaded.

    A package that is not installed on this machine is downloaded, because its metadata lists further dependencies.
    """
    pins: dict[str, str] = {}
    fetched: dict[str, metadata.Distribution] = {}
    visited: set[tuple[str, str]] = set()
    waiting = [_requirement(line) for line in roots]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name not in fetched:
            try:
                distribution = metadata.distribution(name)
                pins[name] = f"{name}=={distribution.version}"
            except metadata.PackageNotFoundError:
                distribution = fetched[name] = pip.one(f"{name}{wanted.specifier}", name)
        else:
            distribution = fetched[name]
        for extra in ("", *sorted(wanted.extras)):
            if (name, extra) not in visited:
                visited.add((name, extra))
                environment = {**target.markers(), "extra": extra}
                requirements = map(Requirement, distribution.requires or ())
                waiting += [need for need in requirements if need.marker is None or need.marker.evaluate(environment)]
    return list(pins.values()), [f"{name}=={distribution.version}" for name, distribution in fetched.items()]


def _requirement(line: str) -> Requirement:
    from packaging.requirements import InvalidRequirement

    try:
        return Requirement(line)
    except InvalidRequirement as error:
        raise UsageError(f"{line!r} is not a requirement of a package.", remedy="An example is 'pandas>=2'.") from error


class _Pip:
    """Runner of pip that downloads wheels for a target into `folder`.

    If the current Python environment lacks pip, the downloads use pip of a temporary environment.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._made = tempfile.TemporaryDirectory(prefix="batchlab-pip-")
        self._python = ""

    def __enter__(self) -> _Pip:
        return self

    def __exit__(self, *_: object) -> None:
        self._made.cleanup()

    def one(self, requirement: str, name: str) -> metadata.Distribution:
        """Download a package that is not installed on this machine, and return the metadata of its wheel."""
        self.download([requirement])
        for path in self._folder.glob("*.whl"):
            if parse_wheel_filename(path.name)[0] == name:
                with zipfile.ZipFile(path) as wheel:
                    (info,) = {
                        top for top, _, rest in (n.partition("/") for n in wheel.namelist())
                        if top.endswith(".dist-info") and rest == "METADATA"
                    }  # fmt: skip
                    text = wheel.read(f"{info}/METADATA").decode()
                return _WheelMetadata(text)
        raise BackendError(f"pip reports a download of {requirement}, but its wheel is missing.")

    def download(self, requirements: Sequence[str]) -> None:
        """Download a wheel for each requirement. Raise BackendError with pip's reason if a wheel is not available.

        If a package has only a source distribution, pip builds a wheel on this machine. A wheel that is built on this
        machine must be a wheel for any platform.
        """
        wanted = list(requirements)
        while wanted:
            output = self._run("download", *self._target.pip(), *wanted)
            if output is None:
                return
            missing = _MISSING.search(output)
            if missing is None or missing[1] not in wanted:
                raise self._refusal(output)
            wanted.remove(missing[1])
            self._build(missing[1])

    def _build(self, requirement: str) -> None:
        with tempfile.TemporaryDirectory(dir=self._made.name) as temporary:
            output = self._run("wheel", "--no-deps", requirement, folder=temporary)
            if output is not None:
                raise self._refusal(output)
            (wheel,) = Path(temporary).glob("*.whl")
            if not wheel.name.endswith("-none-any.whl"):
                raise self._refusal(f"{requirement} has no wheel for that platform")
            wheel.replace(self._folder / wheel.name)

    def _run(self, command: str, *options: str, folder: str = "") -> str | None:
        """Run a pip command. Return the error output of pip, or None if pip succeeds."""
        done = subprocess.run(
            [
                *(self._interpreter(), "-I", "-m", "pip", command),
                *("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2"),
                *("--dest" if command == "download" else "--wheel-dir", folder or self._folder),
                *options,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            # Without SOURCE_DATE_EPOCH, a wheel that pip builds would contain the time of the build.
            env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"},
        )
        return (done.stderr or done.stdout).strip() if done.returncode else None

    def _refusal(self, output: str) -> BackendError:
        return BackendError(
            f"The packages for {self._target} cannot be fetched: {pip_reason(output)}.",
            remedy="Check the network and pip's settings. Each package needs a wheel for this platform.",
        )

    def _interpreter(self) -> str:
        if self._python:
            return self._python
        if util.find_spec("pip"):
            self._python = sys.executable
            return self._python
        done = subprocess.run(
            [sys.executable, "-I", "-m", "venv", self._made.name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BackendError(
                f"pip is missing, so packages cannot be downloaded: {pip_reason(done.stdout.strip())}.",
                remedy=f"Install pip for {sys.executable}.",
            )
        self._python = os.fspath(Path(self._made.name) / "bin" / "python")
        return self._python


class _WheelMetadata(metadata.Distribution):
    """Distribution of `importlib.metadata` that contains only the METADATA file of a wheel."""

    def __init__(self, text: str) -> None:
        self._text = text

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        raise FileNotFoundError(os.fspath(path))


SUFFIX = ".tar.gz"
PREFIX = "boot/"
"""Folder of releases in the stack's bucket. The lifecycle rules of the bucket do not delete releases."""
DATABASE_CA = "database-ca.pem"
ENDS_FLEET = "ENDS_FLEET=yes"
"""Line in a release whose manager postpones the scheduled actions that end a fleet without a manager."""
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
    """Build a release for the architecture and the Python version, and return the path `<folder>/<sha256>.tar.gz`.

    If `python` is "", use the version of the running Python. The archive contains the PyPI `packages` that users' tasks
    need, the certificates of the database, and `variables` for the environment of the manager and the workers. `say`
    receives progress messages. Raise BackendError if a package is not available, and UsageError for invalid arguments.
    """
    target = Target.of(architecture, python)
    with tempfile.TemporaryDirectory(prefix="batchlab-release-") as temporary:
        wheels = Path(temporary)
        say(f"Fetching the packages for {target}.")
        pins = fetch(wheels, target, packages)
        own_wheel(wheels)
        root = installation.folder("backends") / "aws" / "boot"
        content = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        content["packages.txt"] = ("\n".join(pins) + "\n").encode()
        # The script boot.sh on an instance reads the lines of the file `version` as shell variables.
        version = metadata.version("batchlab")
        lines = (f"VERSION={version}", f"PYTHON={target.python}", f"ARCHITECTURE={target.architecture}", ENDS_FLEET)
        content["version"] = "".join(f"{line}\n" for line in lines).encode()
        if database_ca:
            content[DATABASE_CA] = read_bundle(database_ca)
        if variables:
            content[descriptor.FILE] = descriptor.content(variables)
        content |= {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in wheels.glob("*.whl")}
    path = _write(folder, content)
    size_mib = path.stat().st_size / _MIB
    say(f"The release {release_of(path)[:12]} has {len(pins) + 1} packages, {size_mib:.0f} MiB.")
    return path


def release_of(archive: Path) -> str:
    """Return the SHA-256 in the name of a release archive, which is the value of the stack's parameter `Release`."""
    return archive.name.removesuffix(SUFFIX)


def key_of(release: str) -> str:
    """Return the key of a release in the stack's bucket."""
    return f"{PREFIX}{release}{SUFFIX}"


def upload(objects: Objects, archive: Path, patience: Patience, say: Callable[[str], None]) -> str:
    """Upload the release archive to the stack's bucket, unless the bucket already contains the archive. Return the
    archive's key.
    """
    key, size = key_of(release_of(archive)), archive.stat().st_size

    async def put() -> None:
        object_info = await patience(partial(objects.head, key))
        if object_info and object_info.size == size:
            say(f"The release {release_of(archive)[:12]} is in the bucket already.")
            return
        say(f"Uploading the release {release_of(archive)[:12]}, {size / _MIB:.0f} MiB.")
        await patience(partial(objects.upload, key, archive))

    asyncio.run(put())
    return key


def read_member(archive: Path, name: str, max_bytes: int = _MIB) -> bytes | None:
    """Return the content of a file in a release archive, or None if the archive lacks the file.

    Raise UsageError if `archive` is not a release archive, or if the file is larger than `max_bytes`.
    """
    try:
        with tarfile.open(archive, "r:gz") as opened:
            member = opened.getmember(name)
            file = opened.extractfile(member)
            if file is None or member.size > max_bytes:
                raise tarfile.ReadError(f"{name} is not a file of at most {max_bytes:,} bytes")
            return file.read()
    except KeyError:
        return None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise not_a_release(archive, str(error)) from error


def not_a_release(archive: Path, why: str) -> UsageError:
    return UsageError(
        f"{archive} is not a release: {why}.", remedy="Name an archive from aws/releases in the grid's folder."
    )


def _write(folder: Path, content: dict[str, bytes]) -> Path:
    packed = BytesIO()
    # The archive is not compressed, because the output of a compression library differs between the library's versions.
    # Downloaded wheels are already compressed.
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
