"""Python environment of MiniStack, created once for all grids of a user.

Invariant: MiniStack never uses the user's environment, because it pins an exact version of
botocore. An environment counts only when its marker file exists, so an incomplete one is never
used. A lock keeps two processes from creating it at the same time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from batchlab.core import package_data
from batchlab.core.errors import BackendError, UsageError

VERSION = "1.5.33"
VARIABLE = "BATCHLAB_MINISTACK"
"""Environment variable that names an installation by its `ministack` program or its Python."""

_MARKER = "batchlab-complete"


def find() -> Path | None:
    """Return the Python that has MiniStack, or None without an installation.

    BATCHLAB_MINISTACK names an installation. Without it, the one made by `install` is used. Raise
    UsageError if the variable is wrong.
    """
    if named := os.environ.get(VARIABLE):
        program = Path(named).expanduser()
        # The Python of a virtual environment is a link and works only under its own name.
        is_python = program.name.startswith("python")
        python = program if is_python else program.resolve().with_name("python")
        if not (program.is_file() and os.access(python, os.X_OK)):
            raise UsageError(
                f"{VARIABLE} is {named}, where no MiniStack is installed.",
                remedy="Name its `ministack` program, or unset it: batchlab then installs its own.",
            )
        return python
    python = environment() / "bin" / "python"
    # The interpreter that created the environment may have been removed.
    return python if (environment() / _MARKER).exists() and python.exists() else None


def provide(say: Callable[[str], None]) -> None:
    """Install MiniStack if necessary.

    Raise UsageError if the named environment does not contain it.
    """
    python = install(say)
    if installed_version(python) is None:
        raise UsageError(
            f"{python} has no MiniStack with uvicorn and httptools, which serve it.",
            remedy=f"Install them there (`pip install ministack=={VERSION} uvicorn httptools`), or "
            f"unset {VARIABLE}: batchlab then installs its own.",
        )


def environment() -> Path:
    """Return the folder of the environment that `install` creates, in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # The name differs from that of release 0.1.0, which did not check the hashes of packages.
    return Path(cache) / "batchlab" / f"ministack-{VERSION}-locked"


def requirements() -> Path:
    """Return the file with the requirements of MiniStack and of its server.

    It pins each package to one version, with the hashes of its files.
    """
    return package_data.folder("backends") / "ministack" / "requirements.txt"


def install(say: Callable[[str], None]) -> Path:
    """Return the Python that has MiniStack. Create the environment if there is none.

    `say` receives a progress message. Raise BackendError if the installation fails.
    """
    if found := find():
        return found
    folder = environment()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if found := find():  # another process created it while this one waited for the lock
                return found
            say(f"Fetching MiniStack {VERSION} into {folder}, this once.")
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
            _make(folder)
            # It is a marker and not a rename, because the scripts of an environment contain its
            # path.
            (folder / _MARKER).touch()
    except OSError as error:
        raise BackendError(
            f"MiniStack cannot be installed in {folder}: {error.strerror}.",
            remedy=f"Free some space, set XDG_CACHE_HOME, or name an installation by {VARIABLE}.",
        ) from error
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    python = str(folder / "bin" / "python")
    pip = [python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-input", "--retries", "2"]
    for argv in (
        [sys.executable, "-I", "-m", "venv", str(folder)],
        [*pip, "--require-hashes", "--requirement", str(requirements())],
        [python, "-I", "-c", "import httptools, ministack, uvicorn"],
    ):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            told = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise BackendError(
                f"MiniStack {VERSION} cannot be installed: {pip_reason(told)}.",
                remedy="It comes from PyPI by pip: check the network and pip's settings. Or "
                f"install it yourself (`uv tool install ministack=={VERSION} --with "
                f"uvicorn,httptools`) and let {VARIABLE} name its `ministack`.",
            )


def pip_reason(told: str) -> str:
    """Return the reason of pip's failure from its output, without a full stop."""
    if "DO NOT MATCH THE HASHES" in told:
        return "the package index has a file whose hash differs from the one on record"
    # Without a network, pip's last message is that the package does not exist.
    if "connection broken" in told:
        return "the package index cannot be reached"
    return " ".join(told.splitlines()[-1:]).removeprefix("ERROR: ").rstrip(".")


def installed_version(python: Path) -> str | None:
    """Return the version of MiniStack in that Python.

    Return None if MiniStack or a package that serves it is missing.
    """
    code = "import httptools, uvicorn; from importlib.metadata import version; "
    code += "print(version('ministack'))"
    argv = [str(python), "-I", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
