"""Functions that start and remove a grid in containers.

Invariant: `up` either starts the whole grid or removes the parts of the grid that `up` created. `down` removes all
parts of the grid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from batchlab.adapters.aws.endpoint import Endpoint, loopback
from batchlab.core import container_images
from batchlab.core.atomic_write import write_whole
from batchlab.core.errors import Unreachable, UsageError
from batchlab.core.model import Pool
from batchlab.core.protocol import object_keys
from batchlab.runtime import compose_deployment, compose_project, descriptor, pool_images
from batchlab.runtime.compose_deployment import MANAGER_PORT, Deployment
from batchlab.runtime.compose_project import Project, name_for, networks
from batchlab.runtime.descriptor import pool_option
from batchlab.runtime.factory import VARIABLE, Backend, new_bucket_name
from batchlab.runtime.home import Home, ManagerRecord, Place
from batchlab.runtime.settings import notification_variables

_TYPE = "m7i.large"
"""Instance type of a pool that does not name an instance type."""
_WORKER = ["worker", "--backend", compose_deployment.NAME, "--home", "/tmp/batchlab"]  # noqa: S108 - in the container
_NOBODY = 10001
SERVICES = frozenset({"localstack", "postgres", "asg", "manager"})


def up(home: Home, backend: Backend, pools: Sequence[Pool], say: Callable[[str], None]) -> ManagerRecord:
    """Start the grid with the installed code, or restart the grid's stopped parts.

    The function returns when the manager leads the grid or is about to take the lease. Raise BackendError if a part of
    the grid does not start, and UsageError if the settings or the home are unsuitable.
    """
    place = backend.find_place(home)
    if place:
        _refuse_loopback(place)
        backend.provide(home, say)
    for name, value in descriptor.inherited_variables(os.environ).items():
        if "ENDPOINT" in name and loopback(value):
            say(
                f"{name} is {value}. In a container, this is the container itself. Let the receiver listen on an "
                f"address that containers can reach, and set {name} to this address."
            )
    _refuse_foreign(home)
    home.make()
    compose_deployment.folder(home).mkdir(exist_ok=True)
    with compose_deployment.lock(home):
        if running := home.record():  # Another command has started the grid while this command waited for the lock.
            return running
        return _up(home, backend, pools, place, say)


def _up(
    home: Home, backend: Backend, pools: Sequence[Pool], named: Place | None, say: Callable[[str], None]
) -> ManagerRecord:
    passed = notification_variables(home)  # Check the notification settings before any part of the grid starts.
    deployment = compose_deployment.read(home)
    try:
        at = _plan(home, backend, pools, deployment, named, say)
        project = Project(home, at, settings=_settings(at), passed=passed)
        project.up(say, storage=named is None)
    except BaseException:
        # Keep the parts of a grid that existed before, because the grid has work and a database.
        if deployment is None:
            if begun := compose_deployment.read(home):
                Project(home, begun, settings={}).down()
            _forget(home, backend)
        raise
    record = home.record()
    if record is None:
        raise Unreachable(
            f"The manager ended immediately after its start: {project.last_line('manager')}.",
            remedy=f"`batchlab grid up --backend {backend.name}` starts it again.",
        )
    return record


def resume(home: Home, backend: Backend, say: Callable[[str], None]) -> None:
    """Start the parts of a running grid that have ended. Raise BackendError if a part does not start."""
    with compose_deployment.lock(home):
        at = compose_deployment.read(home)
        if at is None:
            return
        named = backend.find_place(home)
        project = Project(home, at, settings={})
        if project.states().keys() >= (SERVICES if named is None else SERVICES - {"localstack"}):
            project.resume(say)
        else:
            _up(home, backend, (), named, say)  # a container was removed


def down(home: Home, backend: Backend) -> bool:
    """Remove every part of the grid. Return False if the grid does not exist."""
    if compose_deployment.read(home) is None:
        return False
    with compose_deployment.lock(home):
        at = compose_deployment.read(home)
        if at is None:
            return False
        place = home.place(backend.name)
        # The instances need not return their work to the grid's own LocalStack, because this LocalStack is also
        # removed.
        keeps = place is not None and place.named
        Project(home, at, settings={}).down(drain_s=backend.worker.drain_s if keeps else 0.0)
        _forget(home, backend)
    return True


def _plan(
    home: Home,
    backend: Backend,
    pools: Sequence[Pool],
    existing: Deployment | None,
    named: Place | None,
    say: Callable[[str], None],
) -> Deployment:
    """Choose the locations of all parts of the grid, build the image, and write the deployment.

    An existing grid keeps the locations of its parts.
    """
    recipe = compose_project.Recipe.from_settings(os.environ, apt=backend.image.apt, pip=backend.image.pip)
    log = home.backend_folder(backend.name) / "image.log"
    image = compose_project.provide(recipe, log, say)
    if existing is None:
        name = name_for(home)
        subnet = compose_deployment.free_subnet(networks(), name)
        at = Deployment(name, subnet, image, _user(), compose_project.python_of(image))
    else:
        at = replace(existing, image=image, python=compose_project.python_of(image))
    # A restarted grid keeps its pools, but its images contain the installed code of batchlab, which may be new.
    kept = {name: reference for name, (reference, _) in at.pool_images.items()} if existing and not pools else None
    wanted = descriptor.images_of(pools or backend.pools) if kept is None else kept
    images = pool_images.provide_all(wanted, log, say)
    at = replace(at, pool_images={name: (image.reference, image.tag) for name, image in images.items()})
    pools = [replace(p, image=images[p.name].reference) if p.image else p for p in pools or ()]
    if pools:
        at = replace(at, pools=tuple(map(pool_option, pools)))
    place = (
        named
        or (home.place(backend.name) if existing else None)
        or Place(at.storage_url(_storage_port()), new_bucket_name(), named=False)
    )
    compose_deployment.write(home, at)
    path = compose_deployment.folder(home) / "templates.toml"
    if existing and not pools and path.exists():  # The user may have edited the existing launch templates.
        templates = path.read_text()
        tags = {
            existing.image: at.image,
            **{old: at.pool_images[name][1] for name, (_, old) in existing.pool_images.items()},
        }
        for old, new in tags.items():
            templates = templates.replace(f"image = {json.dumps(old)}", f"image = {json.dumps(new)}")
    else:
        more = descriptor.inherited_variables(os.environ)
        templates = templates_for(at, place, pools or backend.pools, more)
    write_whole(path, templates)  # The write is atomic, because an Auto Scaling endpoint may read the templates.
    home.write_place(backend.name, place)
    home.token()
    _change_owner(home, at.user)
    return at


def templates_for(
    at: Deployment, place: Place, pools: Sequence[Pool], more: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return the launch templates of the pools for `asg serve`, with the environment variables `more`."""
    shared = {**more, VARIABLE: f"{place.url}/{place.bucket}", compose_deployment.METADATA_VARIABLE: at.metadata_url}
    lines = []
    for pool in pools:
        reference, image = at.pool_images.get(pool.name, ("", at.image))
        env = {**shared, container_images.VARIABLE: reference} if reference else shared
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in env.items())
        name = json.dumps(compose_deployment.TEMPLATE.replace("{pool}", pool.name))
        lines += [
            f"[[{name}.version]]",
            f"image = {json.dumps(image)}",
            f"command = {json.dumps(_WORKER)}",
            f"network = {json.dumps(at.project)}",
            f"user = {json.dumps(at.user)}",
            f"type = {json.dumps(pool.instance_type or _TYPE)}",
            f"slots = {pool.slots}",
            *(
                [f"gpus = {pool.gpus}", f"gpu_devices = {str(descriptor.uses_gpu_devices()).lower()}"]
                if pool.gpus
                else []
            ),
            f"env = {{ {table} }}",
            "",
        ]
    return "\n".join(lines)


def _refuse_loopback(named: Place) -> None:
    if Endpoint(named.url).loopback:
        raise UsageError(
            f"In a container, {named.url} is the container itself.",
            remedy="Let the service listen on an address that containers can reach, and name this address.",
        )


def _storage_port() -> int:
    from localstack_client.config import DEFAULT_EDGE_PORT

    port = os.environ.get("BATCHLAB_LOCALSTACK_PORT") or str(DEFAULT_EDGE_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"BATCHLAB_LOCALSTACK_PORT is {port!r}, which is not a port.",
            remedy=f"Unset it to use the port {DEFAULT_EDGE_PORT}.",
        )
    return int(port)


def _refuse_foreign(home: Home) -> None:
    """Raise UsageError if root uses a home with other files, because the grid changes the owner of the home."""
    folder = home.path
    grid_files = {object_keys.MADE, home.settings_file.name, home.notify_file.name}
    is_grids = not folder.exists() or (folder / object_keys.MADE).exists()
    if not os.getuid() and not is_grids and {path.name for path in folder.iterdir()} - grid_files:
        raise UsageError(
            f"{folder} contains other files. A grid in containers that root starts changes the owner of its folder.",
            remedy="Name a new or an empty folder with --home, or start the grid as another user than root.",
        )


def _user() -> str:
    """Return the user id and the group id of the calling user, who then owns the files that the containers create.

    For root, return the ids of an unprivileged user.
    """
    uid, gid = os.getuid(), os.getgid()
    return f"{uid}:{gid}" if uid else f"{_NOBODY}:{_NOBODY}"


def _change_owner(home: Home, user: str) -> None:
    """Make the containers' user the owner of root's files, because the containers do not run as root."""
    if os.getuid():
        return
    uid, gid = (int(part) for part in user.split(":"))
    for path in container_paths(home):
        # Do not follow symbolic links, because the new owner of the folder may replace a file with a symbolic link.
        with suppress(FileNotFoundError):
            os.chown(path, uid, gid, follow_symlinks=False)


def container_paths(home: Home) -> list[Path]:
    """Return the paths in a home that the containers use.

    The home may also contain other files of the user, whose owner does not change.
    """
    files = [home.path / name for name in (object_keys.MADE, "token", "manager.json", "manager.lock")]
    files += [home.settings_file, home.notify_file]
    # The containers must be able to write in the home and in its folders for objects, fleet, and scratch.
    folders = [home.path, home.objects, home.fleet, home.scratch]
    own = compose_deployment.folder(home)
    return [*folders, *files, own, *own.rglob("*")]


def _settings(at: Deployment) -> dict[str, str]:
    command = [
        "manager",
        "--home",
        compose_deployment.HOME,
        "--backend",
        compose_deployment.NAME,
        "--host",
        at.manager_host,
        "--port",
        str(MANAGER_PORT),
    ]
    for pool in at.pools:
        command += ["--pool", pool]
    settings = {"BATCHLAB_MANAGER_COMMAND": " ".join(command)}
    if os.environ.get("LOCALSTACK_AUTH_TOKEN") and not os.environ.get("BATCHLAB_LOCALSTACK_IMAGE"):
        # With a token for LocalStack, the grid uses a newer LocalStack image, which requires the token.
        settings["BATCHLAB_LOCALSTACK_IMAGE"] = "localstack/localstack:latest"
    return settings


def _forget(home: Home, backend: Backend) -> None:
    """Delete the file of the deployment, and the record of the bucket in the grid's own LocalStack."""
    compose_deployment.forget(home)
    place = home.place(backend.name)
    if place and not place.named:
        home.forget_place(backend.name)
