"""What `doctor` looks at of a stack on AWS: who calls, what is there, and the way to its manager.

Invariant: nothing is asked that changes something or costs money.

What `doctor` looks at where the grid runs in containers.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batchlab.cli.doctor import Finding, Level
from batchlab.core.errors import BackendError, UsageError
from batchlab.runtime.compose import deployment, images, project
from batchlab.runtime.home import Home

if TYPE_CHECKING:
    from batchlab.runtime.factory import Backend
    from batchlab.runtime.home import Home


def _caller(region: str | None) -> Finding:
    """Whose credentials AWS's tools find, and in which region."""
    from batchlab.cli.deploy_output import tries
    from batchlab.deploy.account import Account

    try:
        with Account.open(region, notes=tries) as account:
            text = f"{account.id} in {account.region}, as {account.who}"
            place = "" if account.is_real else ", at what AWS_ENDPOINT_URL puts in AWS's place"
            return Finding("account", Level.OK, text + place)
    except (BackendError, UsageError) as error:
        return Finding("account", Level.FAIL, error.message, error.remedy)


def _manager(home: Home, backend: Backend) -> Finding:
    """The stack that this home knows, and the instance of its manager."""
    from batchlab.runtime.aws import session_manager

    try:
        at = backend.stack(home)
        instance = session_manager.manager_instance(at)
    except BackendError as error:
        return Finding("stack", Level.FAIL, error.message, error.remedy)
    text = f"{at.stack} in {at.region}: its manager runs on {instance}"
    return Finding("stack", Level.OK, text)


def stack(home: Home, backend: Backend) -> Iterator[Finding]:
    """A finding for each."""
    from batchlab.client.aws_connection import VARIABLE
    from batchlab.runtime.aws import deployment as deployment
    from batchlab.runtime.aws import session_manager

    try:
        known = deployment.read(home)
    except BackendError:
        known = None  # told below
    yield (caller := _caller(known.region if known else None))
    # Without credentials the rest would only say so again.
    if caller.level is Level.OK or not known:
        yield _manager(home, backend)
    if named := os.environ.get(VARIABLE):
        yield Finding("session", Level.OK, f"the manager is reached at {named}")
        return
    try:
        yield Finding(
            "session", Level.OK, f"sessions are carried by {session_manager.find_plugin()}"
        )
    except UsageError as error:
        yield Finding("session", Level.FAIL, error.message, error.remedy)


ENGINE = 25
"""The first that knows how often to look at the health of what is starting."""
COMPOSE = (2, 20)
"""The first in which a service may depend on another that is not always there."""
LAST_WITHOUT_TOKEN = (4, 14)
OLDEST = (4, 0)
"""LocalStack before that knows no conditional writes to S3."""
FAIL_BELOW_BYTES = 3 * 2**30
_LOCALSTACK = "localstack/localstack:4.14.0"
_POSTGRES = "postgres:17"


def containers(home: Home, backend: Backend) -> Iterator[Finding]:
    """Docker and its plugins, the images, the token, the network; and what is up already."""
    version = images.docker("version", "--format", "{{.Server.Version}}")
    if version.returncode:
        told = (version.stderr.strip().splitlines() or ["it says nothing"])[-1]
        remedy = "Start Docker, and see that you may use it (`docker info`)."
        yield Finding("docker", Level.FAIL, f"Docker does not answer: {told}", remedy)
        return
    yield _engine(version.stdout.strip())
    yield _plugin("compose", COMPOSE)
    yield _plugin("buildx", (0, 10))
    yield _room()
    named = backend.named_place(home)
    if not named:
        yield _token()
        yield _image("BATCHLAB_LOCALSTACK_IMAGE", _LOCALSTACK)
    yield _image("BATCHLAB_POSTGRES_IMAGE", _POSTGRES)
    recipe = images.Recipe.of(os.environ, apt=backend.image.apt, pip=backend.image.pip)
    yield _image("BATCHLAB_BASE_IMAGE", recipe.base)
    yield from _parts(home)


def _engine(version: str) -> Finding:
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < ENGINE:
        return _old("docker", f"Docker {version}", f"Install Docker {ENGINE} or newer.")
    return Finding("docker", Level.OK, f"Docker {version} answers")


def _plugin(name: str, least: tuple[int, int]) -> Finding:
    asked = images.docker(name, "version")
    found = re.search(r"(\d+)\.(\d+)", asked.stdout)
    remedy = f"Install Docker's {name} plugin (docker-{name}), {least[0]}.{least[1]} or newer."
    if asked.returncode or found is None:
        return Finding(name, Level.FAIL, f"There is no `docker {name}`.", remedy)
    version = (int(found[1]), int(found[2]))
    text = f"docker {name} {found[0]}"
    return Finding(name, Level.OK, text) if version >= least else _old(name, text, remedy)


def _old(name: str, text: str, remedy: str) -> Finding:
    return Finding(name, Level.FAIL, f"{text} is too old.", remedy)


def _room() -> Finding:
    root = images.docker("info", "--format", "{{.DockerRootDir}}").stdout.strip()
    try:
        found = os.statvfs(root)
    except OSError:
        return Finding("disk", Level.OK, f"Docker keeps its images in {root}, not on this machine")
    free_bytes = found.f_bavail * found.f_frsize
    text = f"{free_bytes / 2**30:.1f} GiB free for Docker's images in {root}"
    if free_bytes < FAIL_BELOW_BYTES:
        return Finding("disk", Level.FAIL, text, "Free some, for example by `docker image prune`.")
    return Finding("disk", Level.OK, text)


def _token() -> Finding:
    image = os.environ.get("BATCHLAB_LOCALSTACK_IMAGE") or _LOCALSTACK
    has_token = bool(os.environ.get("LOCALSTACK_AUTH_TOKEN"))
    found = re.search(r":v?(\d+)\.(\d+)", image)
    if found is None or has_token:
        whose = "with LOCALSTACK_AUTH_TOKEN" if has_token else "by its name it needs no token"
        return Finding("token", Level.OK, f"{image}, {whose}")
    version = (int(found[1]), int(found[2]))
    if version > LAST_WITHOUT_TOKEN:
        return Finding(
            "token",
            Level.FAIL,
            f"{image} starts only with a token, and LOCALSTACK_AUTH_TOKEN is not set.",
            f"Set it, or use {_LOCALSTACK}, the last that needs none.",
        )
    if version < OLDEST:
        return Finding(
            "token",
            Level.FAIL,
            f"{image} is too old: it knows no conditional writes to S3.",
            f"Use {_LOCALSTACK}, or leave BATCHLAB_LOCALSTACK_IMAGE out.",
        )
    return Finding("token", Level.OK, f"{image} needs no token")


def _image(variable: str, default: str) -> Finding:
    name = os.environ.get(variable) or default
    if not images.docker("image", "inspect", name).returncode:
        return Finding("image", Level.OK, f"{name} is here")
    return Finding(
        "image",
        Level.WARN,
        f"{name} is not here yet; the first grid pulls it",
        f"Without an image registry: compose/offline/build.sh, and {variable} names the result.",
    )


def _parts(home: Home) -> Iterator[Finding]:
    at = deployment.read(home)
    if at is None:
        subnet = deployment.free_subnet(project.networks(), project.name_for(home))
        yield Finding("network", Level.OK, f"the network {subnet}.0/24 is free")
    else:
        states = project.Project(home, at, settings={}).states()
        for service, state in sorted(states.items()):
            level = Level.OK if state == "healthy" else Level.FAIL
            remedy = "" if level is Level.OK else "`batchlab grid up` starts it again."
            yield Finding("service", level, f"{service} is {state}", remedy)
        if "localstack" in states and (place := home.place(deployment.NAME)):
            yield _localstack(place.url)
    for one in project.projects():
        if one.is_orphan:
            text = f"{one.project} has been left behind, with {one.parts} parts"
            yield Finding("orphans", Level.WARN, text, "`batchlab gc` removes it.")


def _localstack(storage: str) -> Finding:
    url = f"{storage}/_localstack/health"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own network
            version = str(json.load(answer).get("version", "unknown"))
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise BackendError(f"LocalStack does not answer at {url}: {error}.") from error
    return Finding("emulator", Level.OK, f"LocalStack {version} answers")
