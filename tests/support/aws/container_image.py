"""An image registry for instances of a stack that has a ContainerImage.

The registry is on the network of the instances, has the name of an account's ECR, and requires the password that ECR
returns. Each instance has its own Docker Engine, and pulls the image as its user data says.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchlab.adapters.aws.endpoint import Endpoint
from batchlab.runtime import compose_project
from tests.support.aws import instance_boot
from tests.support.aws.account import REGION
from tests.support.aws.autoscaling_api import aws
from tests.support.aws.instance_boot import Fleet
from tests.support.certificates import Authority
from tests.support.docker import containers
from tests.support.waiting import until

HOST = f"123456789012.dkr.ecr.{REGION}.amazonaws.com"
NAME = f"{HOST}/batchlab:1"
SCRIPT = Path(__file__).with_name("registry.py")


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True, timeout=300)
    return done.stdout


@dataclass(frozen=True)
class Trusting:
    """An instance image that trusts the registry's certificate, and the authority that signs this certificate."""

    image: str
    authority: Authority


@contextmanager
def trusting(folder: Path) -> Iterator[Trusting]:
    """Build the image, and remove it on exit. All containers of the image must end before."""
    instance_boot.need_instances()
    authority = Authority(folder, "registry")
    place = folder / "certs.d" / HOST
    place.mkdir(parents=True)
    shutil.copy(authority.bundle, place / "ca.crt")
    name, tag = f"batchlab-test-boxed-{os.getpid()}", f"batchlab-test/boxed:{os.getpid()}"
    try:
        docker("create", "--name", name, instance_boot.IMAGE)
        docker("cp", str(folder / "certs.d"), f"{name}:/etc/docker/")
        docker("commit", name, tag)
        yield Trusting(tag, authority)
    finally:
        docker("rm", "--force", "--volumes", name)
        docker("rmi", "--force", tag)


@dataclass(frozen=True)
class Registry:
    """A running image registry. `asked` returns the requests that the registry has received."""

    container: str

    def asked(self) -> list[str]:
        return docker("logs", self.container).splitlines()


@contextmanager
def registry(there: Fleet, trusted: Trusting, folder: Path, tag: str = "") -> Iterator[Registry]:
    """Serve the image `tag` to the account's instances under NAME. By default, the image is that of the localstack grid
    without optional packages for tasks."""
    folder.mkdir()
    recipe = compose_project.Recipe.from_settings(
        {**os.environ, "BATCHLAB_IMAGE_APT": "", "BATCHLAB_IMAGE_PIP": ""}, apt=(), pip=()
    )
    tag = tag or compose_project.provide(recipe, folder / "image.log", print)
    docker("save", "--output", str(folder / "image.tar"), tag)
    trusted.authority.sign(folder, HOST)
    told = aws(Endpoint(there.env["AWS_ENDPOINT_URL_ECR"], REGION), "ecr").get_authorization_token()
    (token,) = told["authorizationData"]
    password = base64.b64decode(token["authorizationToken"]).decode().removeprefix("AWS:")
    name = f"{there.grid.id}-registry"
    docker(
        "run",
        "--detach",
        "--name",
        name,
        "--label",
        f"batchlab.grid={there.grid.id}",
        "--network",
        there.grid.id,
        "--network-alias",
        HOST,
        "--env",
        f"REGISTRY_PASSWORD={password}",
        "--mount",
        f"type=bind,source={folder},target=/registry,readonly",
        "--mount",
        f"type=bind,source={SCRIPT},target=/registry.py,readonly",
        containers.IMAGE,
        "python3",
        "-u",
        "/registry.py",
    )
    try:
        found = Registry(name)
        until(lambda: "ready" in found.asked(), 60)
        yield found
    finally:
        docker("rm", "--force", name)
