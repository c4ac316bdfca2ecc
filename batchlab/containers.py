"""A grid in containers, seen from outside: brought up, taken down, found again.

Invariant: what `up` has begun it finishes or takes back; `down` leaves nothing of it behind.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from batchlab.adapters.compose import deployment, images
from batchlab.adapters.compose.deployment import MANAGER_PORT, Deployment
from batchlab.adapters.compose.project import Project, name_for, networks
from batchlab.backends import VARIABLE, Backend, fresh_bucket
from batchlab.errors import Unreachable, UsageError
from batchlab.home import Home, ManagerRecord, Place
from batchlab.model import Pool

STORAGE_PORT = 4566
_TYPE = "m7i.large"
"""Of instances of a pool that names none."""
_WORKER = ["worker", "--backend", deployment.NAME, "--home", "/tmp/batchlab"]  # noqa: S108 - its own
_NOBODY = 10001


def up(
    home: Home, backend: Backend, pools: Sequence[Pool], say: Callable[[str], None]
) -> ManagerRecord:
    """Bring the grid up, or bring back what has stopped of it; returns when its manager leads or
    is about to. BackendError, UsageError."""
    named = backend.named_place(home)
    if named:
        backend.provide(home, say)
    at = deployment.read(home)
    is_fresh = at is None
    if at is None:
        at = _plan(home, backend, pools, named, say)
    project = Project(home, at, settings=_settings(at, pools))
    try:
        project.up(say, storage=named is None)
    except BaseException:
        if is_fresh:
            project.down()
            _forget(home, backend)
        raise
    record = home.record()
    if record is None:
        raise Unreachable(
            f"The manager ended as soon as it had started: {project.last_line('manager')}.",
            remedy=f"`batchlab grid up --backend {backend.name}` starts it again.",
        )
    return record


def check_python(home: Home) -> None:
    """UsageError unless the instances run on this process's Python: functions travel as bytecode,
    which no other version understands."""
    at = deployment.read(home)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if at and at.python != here:
        raise UsageError(
            f"The grid's instances run on Python {at.python}, and this is Python {here}: functions "
            "cannot be sent to them.",
            remedy=f"Name an image with Python {here} by BATCHLAB_BASE_IMAGE before the grid comes "
            "up, or describe the job in a file.",
        )


def down(home: Home, backend: Backend) -> bool:
    """Remove every part; False where there is none."""
    at = deployment.read(home)
    if at is None:
        return False
    place = home.place(backend.name)
    # In a LocalStack of the grid's own nobody will ever ask for it.
    keeps = place is not None and place.named
    Project(home, at, settings={}).down(drain_s=backend.worker.drain_s if keeps else 0.0)
    _forget(home, backend)
    return True


def _plan(
    home: Home,
    backend: Backend,
    pools: Sequence[Pool],
    named: Place | None,
    say: Callable[[str], None],
) -> Deployment:
    """Decide where everything will be, make the image, and write it all down."""
    home.make()
    subnet = deployment.free_subnet(networks())
    recipe = images.Recipe.of(os.environ, apt=backend.image.apt, pip=backend.image.pip)
    image = images.provide(recipe, home.of(backend.name) / "image.log", say)
    at = Deployment(name_for(home), subnet, image, _user(), images.python_of(image))
    place = named or Place(at.storage_url(_storage_port()), fresh_bucket(), named=False)
    deployment.write(home, at)
    templates = templates_for(at, place, pools or backend.pools)
    (deployment.folder(home) / "templates.toml").write_text(templates)
    home.write_place(backend.name, place)
    home.token()
    _hand_over(home, at.user)
    return at


def templates_for(at: Deployment, place: Place, pools: Sequence[Pool]) -> str:
    """The launch templates of the pools, for `asg serve`."""
    env = {
        VARIABLE: f"{place.url}/{place.bucket}",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": at.metadata_url,
    }
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in env.items())
    lines = []
    for pool in pools:
        name = json.dumps(deployment.TEMPLATE.replace("{pool}", pool.name))
        lines += [
            f"[[{name}.version]]",
            f"image = {json.dumps(at.image)}",
            f"command = {json.dumps(_WORKER)}",
            f"network = {json.dumps(at.project)}",
            f"user = {json.dumps(at.user)}",
            f"type = {json.dumps(pool.instance_type or _TYPE)}",
            f"slots = {pool.slots}",
            f"env = {{ {table} }}",
            "",
        ]
    return "\n".join(lines)


def _storage_port() -> int:
    return int(os.environ.get("BATCHLAB_LOCALSTACK_PORT") or STORAGE_PORT)


def _user() -> str:
    """Whoever calls, so that what the containers write in the home is theirs; never root."""
    uid, gid = os.getuid(), os.getgid()
    return f"{uid}:{gid}" if uid else f"{_NOBODY}:{_NOBODY}"


def _hand_over(home: Home, user: str) -> None:
    """Root's own files cannot be read in the containers, where nobody is root."""
    if os.getuid():
        return
    uid, gid = (int(part) for part in user.split(":"))
    for path in (home.path, *home.path.rglob("*")):
        if not path.is_symlink():
            os.chown(path, uid, gid)


def _settings(at: Deployment, pools: Sequence[Pool]) -> dict[str, str]:
    command = [
        *("manager", "--home", deployment.HOME, "--backend", deployment.NAME),
        *("--host", at.manager_host, "--port", str(MANAGER_PORT)),
    ]
    for pool in pools:
        command += ["--pool", f"{pool.name}:{pool.min_size}-{pool.max_size}x{pool.slots}"]
    settings = {"BATCHLAB_MANAGER_COMMAND": " ".join(command)}
    if os.environ.get("LOCALSTACK_AUTH_TOKEN") and not os.environ.get("BATCHLAB_LOCALSTACK_IMAGE"):
        # Newer ones than the compose file's own start with a token only.
        settings["BATCHLAB_LOCALSTACK_IMAGE"] = "localstack/localstack:latest"
    return settings


def _forget(home: Home, backend: Backend) -> None:
    """What was in a LocalStack of the grid's own is gone with it, and so is where it was."""
    deployment.forget(home)
    place = home.place(backend.name)
    if place and not place.named:
        home.forget_place(backend.name)


def logs(home: Home) -> Path:
    """Where the output of the services is kept once they are gone."""
    return deployment.folder(home) / "services.log"
