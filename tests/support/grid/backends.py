"""The backends as a user sees them. A world has a home, an environment, and the commands.

`pytest --all -m aws` creates a stack on AWS with a budget of BATCHLAB_AWS_BUDGET_USD dollars, and always deletes it.
Every other run tests the same commands on an emulated control plane.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest

from batchlab.adapters.aws.endpoint import Endpoint
from tests.support import forked_cli
from tests.support.aws.autoscaling_api import aws as client
from tests.support.aws.control_plane import REGION, control_plane
from tests.support.docker.grid import need_containers

BUDGET = "BATCHLAB_AWS_BUDGET_USD"
HOURS = 1.0
"""The maximum life of the stack of a run on AWS, from which the test computes the maximum cost before the run."""
POOL = "default:0-2x2@m7i.large"


def command(*arguments: object, env: Mapping[str, str] = {}, within_s: float = 400, code: int = 0) -> tuple[str, str]:
    """Run `batchlab` with these arguments, check that it exits with `code`, and return stdout and stderr."""
    done = forked_cli.run([*map(str, arguments)], {**os.environ, **env}, within_s)
    assert done.code == code, (arguments, done.out[-2000:], done.err[-3000:])
    return done.out, done.err


@dataclass
class World:
    """A backend that is running or can be started."""

    name: str
    backend: str
    home: Path
    env: Mapping[str, str] = field(default_factory=dict)
    has_ffmpeg: bool = True
    aws: Callable[[str], Any] = lambda _: None
    """Returns a boto3 client of the account's owner, if the backend has an account."""

    def batchlab(self, *arguments: object, within_s: float = 600) -> tuple[str, str]:
        """Run a command in this world, and return stdout and stderr. Fail if the command fails."""
        return command(*arguments, "--home", self.home, env=self.env, within_s=within_s)

    def run(self, job: Path, out: Path) -> str:
        """Run a job file, and return the progress output."""
        return self.batchlab("run", job, "--backend", self.backend, "--out", out)[1]


@contextmanager
def plain(name: str, folder: Path) -> Iterator[World]:
    """Yield a backend whose grid the command `run` starts."""
    yield World(name, name, folder / "home")


@contextmanager
def localstack(folder: Path) -> Iterator[World]:
    need_containers(folder)
    world = World("localstack", "localstack", folder / "home")
    world.batchlab("grid", "up", "--backend", "localstack")
    try:
        yield world
    finally:
        world.batchlab("grid", "down")


@contextmanager
def emulated(folder: Path, archive: Path, image: str) -> Iterator[World]:
    """Create a stack of that release on an emulated control plane, with that image for its instances. The destroyed
    stack must not leave anything behind."""
    with control_plane(folder / "account", image) as plane:

        def of_owner(service: str) -> Any:
            name = "AWS_ENDPOINT_URL_AUTO_SCALING" if service == "autoscaling" else "AWS_ENDPOINT_URL"
            return client(Endpoint(plane.env[name], REGION), service)

        world = World(
            name="emulated", backend="aws", home=folder / "home", env=plane.env, has_ffmpeg=False, aws=of_owner
        )
        with _deployed(world, "--release", archive):
            yield world
        plane.until_without_groups()
        assert plane.aws("s3").list_buckets()["Buckets"] == []
        assert plane.aws("sqs").list_queues().get("QueueUrls", []) == []


@contextmanager
def real(folder: Path) -> Iterator[World]:
    """Create a stack on AWS, with the credentials and the region of the user who runs the tests."""
    budget_usd = float(os.environ.get(BUDGET) or 0)
    if budget_usd <= 0:
        pytest.fail(f"A run on AWS costs money: say how much it may be by {BUDGET}.")
    stack = f"batchlab-test-{secrets.token_hex(3)}"
    world = World(
        name="aws",
        backend="aws",
        home=folder / "home",
        has_ffmpeg=False,
        aws=lambda service: boto3.client(service),  # type: ignore[call-overload]
    )
    settings = ("--stack", stack, "--budget", f"{budget_usd:g}")
    most_usd = _most_usd(world, *settings)
    if most_usd > budget_usd:
        pytest.fail(f"An hour of this costs up to {most_usd:.2f} USD, and {BUDGET} is less.")
    with _deployed(world, *settings):
        yield world
        told = json.loads(world.batchlab("cost", "bill", "last", "--json")[0])
        print(f"\nThe last job on {stack}: {json.dumps(told)}")
        print(f"An hour of the stack with all its workers: at most {most_usd:.2f} USD.")


def _most_usd(world: World, *settings: str) -> float:
    """Return the cost of the stack in HOURS if every worker is on demand."""
    plan = json.loads(world.batchlab("deploy", "plan", "--json", "--pool", POOL, *settings)[0])
    cost = plan["cost"]
    workers = sum(one["on_demand_usd_per_hour"]["high"] for one in cost["workers"]) * 2
    return HOURS * float(cost["idle_usd_per_hour"]["high"] + workers)


@contextmanager
def _deployed(world: World, *settings: object) -> Iterator[None]:
    try:
        world.batchlab("deploy", "apply", "--yes", "--pool", POOL, *settings, within_s=3000)
        told = json.loads(world.batchlab("deploy", "status", "--json")[0])
        assert told["drift"] == []
        yield
    finally:
        world.batchlab("deploy", "destroy", "--yes", "--delete-data", within_s=3000)
