"""Images of pools: the runnable image that a grid builds from a pool's image.

A pool's image contains the tools of the pool's tasks and Python, but not batchlab. The grid adds the installed code of
batchlab and its dependencies in a virtual environment below /opt/batchlab, so the workers of all pools run the same
code as the manager.

Invariant: the checks run before the grid starts or changes, so an unsuitable image is one error of the command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from batchlab.core.container_images import digest_of, name_of, repository_of
from batchlab.core.errors import BackendError, UsageError
from batchlab.runtime import compose_project
from batchlab.runtime.compose_project import Recipe, docker

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Docker's PATH in an image that does not set PATH."""
_CHECK = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
_NEEDS = "Install `python3`, version 3.11 or later, with the modules venv and ensurepip in the image."


@dataclass(frozen=True, slots=True)
class PoolImage:
    """An image of a pool on this machine.

    `reference` is the image's name with its digest. Without a digest from a registry, the digest is the image's id on
    this machine. `tag` names the image that the workers run, which contains batchlab.
    """

    reference: str
    tag: str


def require_docker(purpose: str) -> None:
    """Raise UsageError with one sentence about `purpose` if Docker does not answer."""
    if shutil.which("docker") is None:
        raise UsageError(f"{purpose} needs Docker, which is not installed.", remedy="Install Docker.")
    if docker("version", "--format", "{{.Server.Version}}").returncode:
        raise UsageError(
            f"{purpose} needs Docker, and Docker does not answer.",
            remedy="Start Docker, and check with `docker info` that you may use it.",
        )


def provide(image: str, who: str, log: Path, say: Callable[[str], None]) -> PoolImage:
    """Pull and check the image, and build the image that the workers run.

    `who` names the image's user in errors, such as "pool tools". `say` is called before an action that takes long. The
    build writes its output to `log`. Raise UsageError if the image lacks Python, and BackendError if the
    image cannot be pulled or built.
    """
    require_docker(f"The image of {who}")
    details = inspect(image, who, say)
    runnable = _runnable(image, details)
    variables = dict(entry.partition("=")[::2] for entry in details["Config"].get("Env") or [])
    recipe = Recipe(runnable, base_id=details["Id"], path=variables.get("PATH") or _PATH)
    tag = compose_project.build(recipe, log, say, partial(_check_python, runnable, image, who))
    return PoolImage(_reference(image, details), tag)


def provide_all(images: Mapping[str, str], log: Path, say: Callable[[str], None]) -> dict[str, PoolImage]:
    """Provide the images of pools. `images` contains the image of each pool by name of the pool."""
    known: dict[str, PoolImage] = {}
    for pool, image in images.items():
        if image not in known:
            known[image] = provide(image, f"pool {pool}", log, say)
    return {pool: known[image] for pool, image in images.items()}


def inspect(image: str, who: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return Docker's description of an image, which is pulled if it is not on this machine.

    Raise BackendError if the image cannot be pulled.
    """
    if (details := _local(image)) is not None:
        return details
    say(f"Pulling the image {image} of {who}.")
    pulled = docker("pull", "--quiet", image)
    details = None if pulled.returncode else _local(image)
    if details is None:
        cause = (pulled.stderr.strip().splitlines() or ["Docker printed no error message"])[-1].rstrip(".")
        raise BackendError(
            f"The image {image} of {who} is not on this machine and cannot be pulled: {cause}.",
            remedy="Check the name of the image, and sign in to its registry with `docker login`.",
        )
    return details


def _local(image: str) -> dict[str, Any] | None:
    """Return Docker's description of an image on this machine, or None.

    The digest of an image without a registry is its id, under which Docker does not find the image.
    """
    for name in (image, name_of(image)):
        found = docker("image", "inspect", name)
        if not found.returncode:
            details: dict[str, Any] = json.loads(found.stdout)[0]
            if name == image or digest_of(image) == details["Id"]:
                return details
    return None


def _runnable(image: str, details: dict[str, Any]) -> str:
    """Return a name under which Docker finds the image on this machine."""
    return name_of(image) if digest_of(image) == details["Id"] else image


def _reference(image: str, details: dict[str, Any]) -> str:
    if digest_of(image):
        return image
    repository = repository_of(image)
    digests = [digest_of(one) for one in details.get("RepoDigests") or [] if repository_of(one) == repository]
    return f"{image}@{digests[0] if digests else details['Id']}"


def _check_python(runnable: str, image: str, who: str) -> None:
    done = docker("run", "--rm", "--network", "none", "--user", "0", "--entrypoint", "python3", runnable, "-c", _CHECK)
    if done.returncode:
        raise UsageError(f"The image {image} of {who} cannot run a worker.", remedy=_NEEDS)
