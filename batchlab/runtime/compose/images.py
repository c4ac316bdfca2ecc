"""The image that manager, Auto Scaling endpoint and workers run from: this very code.

Invariant: an image's tag is made of everything that goes into it, so one that is there is right.
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
    """What an image is made of beside the code: a base with Python, Debian's packages and PyPI's
    that users' tasks call."""

    base: str
    apt: Sequence[str] = ()
    pip: Sequence[str] = ()

    @classmethod
    def of(cls, settings: Mapping[str, str], *, apt: Sequence[str], pip: Sequence[str]) -> Recipe:
        """From BATCHLAB_BASE_IMAGE, BATCHLAB_IMAGE_APT and BATCHLAB_IMAGE_PIP, where they are set;
        `apt` and `pip` where not."""
        # Functions travel as their bytecode, which only the same Python understands.
        ours = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        return cls(
            settings.get("BATCHLAB_BASE_IMAGE") or ours,
            settings["BATCHLAB_IMAGE_APT"].split() if "BATCHLAB_IMAGE_APT" in settings else apt,
            settings["BATCHLAB_IMAGE_PIP"].split() if "BATCHLAB_IMAGE_PIP" in settings else pip,
        )


def provide(recipe: Recipe, log: Path, say: Callable[[str], None]) -> str:
    """The tag of the image, which is built first where it is missing; `say` hears of that.

    BackendError where the build fails; its output is in `log`.
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
    """The Python in an image, as "3.12"; BackendError where it has none."""
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
    """What batchlab needs, and those of its extras that are installed, each in the version that is
    installed beside it here."""
    from packaging.requirements import Requirement

    found = set()
    for wanted in map(Requirement, metadata.requires("batchlab") or []):
        marker = wanted.marker
        if marker is None or any(marker.evaluate({"extra": one}) for one in _extras()):
            more = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
            found.add(f"{wanted.name}{more}=={metadata.version(wanted.name)}")
    return sorted(found)


def _extras() -> list[str]:
    """What is here of the extras, with "" for what every installation has. Traces are no grid's by
    themselves: who wants them names their packages."""
    return [
        "",
        *(
            one
            for one in optional_dependencies.MODULES
            if one != "otel" and not optional_dependencies.missing(one)
        ),
    ]


def constraints() -> list[str]:
    """All that batchlab needs, by whatever it needs, each in the version that is installed here:
    what a build finds does not depend on its day."""
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
    """What the command line client answers; UsageError where there is none."""
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
