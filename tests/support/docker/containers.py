"""A Docker image for tests, and containers with the labels of a test, which the test run removes.

Without Docker or without the image, the tests are skipped on a laptop and fail in CI.
"""

from __future__ import annotations

import gc
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from docker import APIClient

from batchlab.adapters.aws.metadata_server import Signals
from batchlab.adapters.docker.container import Template
from batchlab.adapters.docker.engine import Engine, remove_resources
from batchlab.adapters.docker.launcher import ContainerLauncher
from batchlab.core import instance_types
from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.core.ports import Clock

IMAGE = os.environ.get("BATCHLAB_BASE_IMAGE", "batchlab-offline/base:trixie")
"""The image needs a shell and Python. compose/offline/build.sh builds the default one."""

ABSENT_IMAGE = "batchlab-test-absent:none"


def need_docker() -> None:
    """Skip the test, or fail in CI, if Docker or the image is missing."""
    if missing := _missing():
        if os.environ.get("CI"):
            pytest.fail(f"CI promises Docker with the image {IMAGE}: {missing}")
        pytest.skip(f"{missing} BATCHLAB_BASE_IMAGE names another image.")


@cache
def _missing() -> str:
    """Return a sentence that names the missing part, or "" if Docker and the image exist."""
    with warnings.catch_warnings():
        # If Docker refuses a connection, the SDK leaves its socket to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            with Engine() as engine:
                found = engine.do("The images", lambda api: api.images(IMAGE))
            missing = "" if found else f"There is no image {IMAGE}."
        except BackendError as error:
            missing = str(error)
        gc.collect()
        return missing


@dataclass(frozen=True)
class DockerGrid:
    """The containers of a grid, as a test sees them."""

    id: str
    api: APIClient
    root: Path

    @property
    def labels(self) -> dict[str, str]:
        return {"batchlab.grid": self.id}

    def launcher(
        self,
        template: Callable[[Pool], Template],
        clock: Clock,
        *,
        engine: Engine | None = None,
        scale: float = 1.0,
        boot_s: float = 0.0,
        signals: Callable[[str], Signals] = lambda _: Signals(),
    ) -> ContainerLauncher:
        """Return a launcher of this grid. A new launcher adopts the containers of the previous one."""
        return ContainerLauncher(
            template,
            instance_types.load(),
            clock,
            self.root,
            grid=self.id,
            labels=self.labels,
            engine=engine,
            scale=scale,
            boot_s=boot_s,
            signals=signals,
        )

    def name(self, instance: str) -> str:
        return f"batchlab-{self.id}-{instance}"

    def printed(self, instance: str) -> str:
        """Return the output of an existing container so far."""
        return bytes(self.api.logs(self.name(instance))).decode()

    def state(self, instance: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.api.inspect_container(self.name(instance))["State"]
        return found


@contextmanager
def docker_grid(root: Path) -> Iterator[DockerGrid]:
    """Yield a grid for one test, and remove all containers with its label afterwards."""
    need_docker()
    grid = DockerGrid(f"test-{os.getpid()}-{secrets.token_hex(3)}", APIClient(version="auto"), root)
    try:
        yield grid
    finally:
        with Engine() as engine:
            remove_resources(engine, grid.labels)
        grid.api.close()


def shell(script: str, **more: Any) -> Template:
    """Return the template of a container that runs a shell script."""
    return Template(IMAGE, ("/bin/sh", "-c", script), **more)


def python(script: str, **more: Any) -> Template:
    """Return the template of a container that runs a Python script."""
    return Template(IMAGE, ("python3", "-u", "-c", script), **more)


def ensure_network(engine: Engine, name: str, labels: Mapping[str, str], *, internal: bool = False) -> str:
    """Create the bridge network `name` if it does not exist, and return this machine's address on the network. If
    `internal` is true, containers cannot reach other networks."""

    def make(api: APIClient) -> str:
        from docker.errors import APIError

        # Docker's name filter also matches a part of a name.
        if not any(n["Name"] == name for n in api.networks(names=[name])):
            try:
                api.create_network(name, driver="bridge", labels=dict(labels), internal=internal)
            except APIError as error:
                if error.status_code != 409:  # another process has just created the network
                    raise
        settings = api.inspect_network(name)["IPAM"]["Config"]
        return str(settings[0]["Gateway"]).partition("/")[0]

    return engine.do(f"The network {name}", make)
