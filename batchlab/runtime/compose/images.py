"""Image of the manager, the Auto Scaling endpoint, and the workers. It contains the installed code.

Invariant: an image's tag is a hash of all its inputs, so an existing image is up to date.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from batchlab.core import optional_dependencies, package_data
from batchlab.core.errors import BackendError, UsageError

REPOSITORY = "batchlab/grid"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Contents of an image in addition to the code.

    `base` is an image with Python. `apt` and `pip` are packages of Debian and PyPI for users'
    tasks.
    """

    base: str
    apt: Sequence[str] = ()
    pip: Sequence[str] = ()

    @classmethod
    def of(cls, settings: Mapping[str, str], *, apt: Sequence[str], pip: Sequence[str]) -> Recipe:
        """Return the recipe from BATCHLAB_BASE_IMAGE, BATCHLAB_IMAGE_APT, and BATCHLAB_IMAGE_PIP.

        Unset variables default to an image with this Python version, and to `apt` and `pip`.
        """
        # Functions travel as bytecode, which only the same version of Python can run.
        ours = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        return cls(
            settings.get("BATCHLAB_BASE_IMAGE") or ours,
            settings["BATCHLAB_IMAGE_APT"].split() if "BATCHLAB_IMAGE_APT" in settings else apt,
            settings["BATCHLAB_IMAGE_PIP"].split() if "BATCHLAB_IMAGE_PIP" in settings else pip,
        )


def provide(recipe: Recipe, log: Path, say: Callable[[str], None]) -> str:
    """Return the tag of the image. Build the image if it does not exist.

    `say` is called before a build. Raise BackendError if the build fails. Its output is in `log`.
    """
    if named := os.environ.get("BATCHLAB_IMAGE"):
        return named
    with tempfile.TemporaryDirectory(prefix="batchlab-image-") as made:
        context = Path(made)
        _fill(context)
        tag = f"{REPOSITORY}:{_digest(context, recipe)}"
        if _exists(tag):
            return tag
        say(f"Building the image {tag} from {recipe.base}, this once.")
        _build(context, recipe, tag, log)
    return tag


def python_of(tag: str) -> str:
    """Return the Python version of an image, such as "3.12".

    Raise BackendError if there is none.
    """
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    asked = docker("run", "--rm", "--network", "none", "--entrypoint", "python", tag, "-c", ask)
    if asked.returncode:
        told = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise BackendError(f"No Python answers in the image {tag}: {told.rstrip('.')}.")
    return asked.stdout.strip()


def _fill(context: Path) -> None:
    for name, path in package_data.files():
        target = context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (context / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    (context / "constraints.txt").write_text("\n".join(constraints()) + "\n")
    shutil.copy(package_data.folder("compose") / "Dockerfile", context / "Dockerfile")


def requirements() -> list[str]:
    """Return batchlab's dependencies and those of its installed extras, with their installed
    versions.
    """
    from packaging.requirements import Requirement

    found = set()
    for wanted in map(Requirement, metadata.requires("batchlab") or []):
        marker = wanted.marker
        if marker is None or any(marker.evaluate({"extra": one}) for one in _extras()):
            more = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            found.add(f"{wanted.name}{more}=={metadata.version(wanted.name)}")
    return sorted(found)


def _extras() -> list[str]:
    """Return the installed extras, and "" for the required dependencies.

    The extra `otel` is left out. Users who want traces add its packages to the image.
    """
    return [
        "",
        *(
            one
            for one in optional_dependencies.MODULES
            if one != "otel" and not optional_dependencies.missing(one)
        ),
    ]


def constraints() -> list[str]:
    """Return all direct and indirect dependencies with their installed versions.

    With these constraints, a build does not depend on its date.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("batchlab", one) for one in _extras()]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        one = metadata.distribution(name)
        found[name] = f"{name}=={one.version}"
        for wanted in map(Requirement, one.requires or ()):
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                named = canonicalize_name(wanted.name)
                waiting += [(named, more) for more in ("", *wanted.extras)]
    del found["batchlab"]
    return sorted(found.values())


def _digest(context: Path, recipe: Recipe) -> str:
    whole = hashlib.sha256(repr((recipe.base, *recipe.apt, "/", *recipe.pip)).encode())
    for path in sorted(context.rglob("*")):
        if path.is_file():
            whole.update(f"{path.relative_to(context)}\0{path.stat().st_size}\0".encode())
            whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def _exists(tag: str) -> bool:
    return not docker("image", "inspect", tag).returncode


def _build(context: Path, recipe: Recipe, tag: str, log: Path) -> None:
    command = ["docker", "build", "--progress", "plain", "-t", tag, "--label", "batchlab.image=1"]
    command += ["--build-arg", f"BASE_IMAGE={recipe.base}"]
    command += ["--build-arg", f"APT={' '.join(recipe.apt)}"]
    command += ["--build-arg", f"PIP={' '.join(recipe.pip)}"]
    for variable in ("PIP_CERT", "SSL_CERT_FILE"):
        if (path := os.environ.get(variable)) and Path(path).is_file():
            command += ["--secret", f"id=ca_bundle,src={path}"]
            break
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        built = subprocess.run(
            [*command, str(context)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
        )
    if built.returncode:
        raise BackendError(
            f"The image could not be built: {_cause(log)}.",
            remedy=f"All of it is in {log}. BATCHLAB_BASE_IMAGE names another base; without an "
            "image registry, compose/offline has a script that makes one.",
        )


def _cause(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "ERROR" in line or "error:" in line.lower()]
    return (told or lines or ["it said nothing"])[-1].rstrip(".")


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the Docker command line client. Raise UsageError if it is not installed."""
    try:
        return subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise UsageError(
            "There is no docker command.",
            remedy="Install Docker with its compose and buildx plugins, or use --backend local.",
        ) from error
