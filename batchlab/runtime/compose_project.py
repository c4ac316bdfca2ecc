"""Docker Compose project of a grid's containers, and the image of the containers.

Invariants: every created container, network, and volume has the label `batchlab.grid` with the project's name.
Resources without the label `batchlab.grid` are never changed. The image of a grid contains the installed code of
batchlab. The image's tag is a hash of all its inputs, so an existing image is up to date.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from batchlab.adapters.docker.engine import Engine, find_resources, remove_resources
from batchlab.core import installation
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.runtime import compose_deployment
from batchlab.runtime.compose_deployment import Deployment
from batchlab.runtime.home import Home

REPOSITORY = "batchlab/grid"
IMAGE_LABEL = "batchlab.image"
PYTHON = "/opt/batchlab/venv/bin/python"
"""Path of Python in the images that compose/Dockerfile builds."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Contents of a grid's image in addition to the code of batchlab.

    `base` is an image with Python. `apt` and `pip` are packages of Debian and PyPI for users' tasks. For a pool's own
    image, `base_id` is the id of the base image, and `path` is the base image's PATH. The tasks of such a pool use the
    programs and the Python packages of the base image.
    """

    base: str
    apt: Sequence[str] = ()
    pip: Sequence[str] = ()
    base_id: str = ""
    path: str = ""

    @classmethod
    def from_settings(cls, settings: Mapping[str, str], *, apt: Sequence[str], pip: Sequence[str]) -> Recipe:
        """Return the image recipe from BATCHLAB_BASE_IMAGE, BATCHLAB_IMAGE_APT, and BATCHLAB_IMAGE_PIP.

        The default of the base image is an image with this process's Python version. The defaults of the packages are
        `apt` and `pip`.
        """
        # Functions are sent as bytecode, which only the same version of Python can run.
        default = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        return cls(
            settings.get("BATCHLAB_BASE_IMAGE") or default,
            settings["BATCHLAB_IMAGE_APT"].split() if "BATCHLAB_IMAGE_APT" in settings else apt,
            settings["BATCHLAB_IMAGE_PIP"].split() if "BATCHLAB_IMAGE_PIP" in settings else pip,
        )


def provide(recipe: Recipe, log: Path, say: Callable[[str], None]) -> str:
    """Return the tag of the grid's image. Build the grid's image if the image does not exist.

    `say` is called before a build of the image. The build writes its output to `log`. Raise BackendError if the build
    fails.
    """
    if named := os.environ.get("BATCHLAB_IMAGE"):
        return named
    return build(recipe, log, say)


def build(recipe: Recipe, log: Path, say: Callable[[str], None], check: Callable[[], None] = lambda: None) -> str:
    """Return the tag of the image of a recipe. Build the image if it does not exist. `check` is called before the
    build. `provide` describes the other arguments and the errors.
    """
    with tempfile.TemporaryDirectory(prefix="batchlab-image-") as folder:
        context = Path(folder)
        _fill(context)
        tag = f"{REPOSITORY}:{_digest(context, recipe)}"
        if not docker("image", "inspect", tag).returncode:
            return tag
        check()
        say(f"Building the image {tag} from {recipe.base}. The next start will use it again.")
        _build(context, recipe, tag, log)
    return tag


def python_of(tag: str) -> str:
    """Return the version of Python in an image, such as "3.12".

    Raise BackendError if Python cannot run in the image.
    """
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = docker("run", "--rm", "--network", "none", "--entrypoint", "python", tag, "-c", code)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["it printed no error message"])[-1]
        raise BackendError(f"Python cannot run in the image {tag}: {error.rstrip('.')}.")
    return done.stdout.strip()


def _fill(context: Path) -> None:
    for name, path in installation.files():
        target = context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (context / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    (context / "constraints.txt").write_text("\n".join(constraints()) + "\n")
    shutil.copy(installation.folder("compose") / "Dockerfile", context / "Dockerfile")


def requirements() -> list[str]:
    """Return the dependencies of batchlab and of its installed extras, with their installed versions."""
    from packaging.requirements import Requirement

    lines = set()
    for requirement in map(Requirement, metadata.requires("batchlab") or []):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in _extras()):
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            lines.add(f"{requirement.name}{extras}=={metadata.version(requirement.name)}")
    return sorted(lines)


def _extras() -> list[str]:
    """Return the names of the installed extras, and "" for the required dependencies of batchlab.

    The extra `otel` is left out of images. Users who want traces must add the packages of `otel` to the image.
    """
    return ["", *(extra for extra in installation.MODULES if extra != "otel" and not installation.missing(extra))]


def constraints() -> list[str]:
    """Return all direct and indirect dependencies of batchlab with their installed versions.

    With version constraints, the content of an image does not depend on the date of the image's build.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = [("batchlab", extra) for extra in _extras()]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        package = metadata.distribution(name)
        lines[name] = f"{name}=={package.version}"
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                required = canonicalize_name(requirement.name)
                todo += [(required, further) for further in ("", *requirement.extras)]
    del lines["batchlab"]
    return sorted(lines.values())


def _digest(context: Path, recipe: Recipe) -> str:
    inputs = (recipe.base, *recipe.apt, "/", *recipe.pip, "/", recipe.base_id, recipe.path)
    digest = hashlib.sha256(repr(inputs).encode())
    for path in sorted(context.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(context)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _build(context: Path, recipe: Recipe, tag: str, log: Path) -> None:
    command = ["docker", "build", "--progress", "plain", "-t", tag, "--label", f"{IMAGE_LABEL}=1"]
    command += ["--build-arg", f"BASE_IMAGE={recipe.base}"]
    command += ["--build-arg", f"APT={' '.join(recipe.apt)}"]
    command += ["--build-arg", f"PIP={' '.join(recipe.pip)}"]
    if recipe.path:
        command += ["--build-arg", "VENV_OPTIONS=--system-site-packages"]
        command += ["--build-arg", f"TASK_PATH={recipe.path}:/opt/batchlab/venv/bin"]
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
            remedy=f"The output of the build is in {log}. BATCHLAB_BASE_IMAGE can name another base image. Without an "
            "image registry, build the images with compose/offline/build.sh.",
        )


def _cause(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "error:" in line.lower()]
    return (errors or lines or ["the build printed nothing"])[-1].rstrip(".")


def docker(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command `docker`. Raise UsageError if the command `docker` is not installed."""
    try:
        return subprocess.run(
            ["docker", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise UsageError(
            "The program `docker` is not installed.",
            remedy="Install Docker with its compose and buildx plugins, or use --backend local.",
        ) from error


LABEL = "batchlab.grid"
HOME_LABEL = "batchlab.home"
START_TIMEOUT_S = 240.0
_POLL_S = 0.3
_RESTARTS = 3
"""Number of restarts of a service's container after which the service counts as failed."""
_ENDED = ("exited", "dead")
_STOP_S = "5"
_SOCKET = "/var/run/docker.sock"


def name_for(home: Home) -> str:
    """Return the name of a home's Compose project.

    The project name of a home never changes, so a home has at most one project.
    """
    return f"batchlab-{hashlib.sha256(str(home.path.resolve()).encode()).hexdigest()[:10]}"


def local_name(home: Home) -> str:
    """Return the value of the label `batchlab.grid` of the containers of a grid whose other instances are processes."""
    return f"{name_for(home)}-local"


def networks() -> list[str]:
    """Return the subnets of every Docker network. Raise Unreachable if Docker does not respond."""
    # List all networks with their details in one call. With a further call for each network, a network could be removed
    # between two calls.
    with Engine() as engine:
        answer = engine.do("list the networks", lambda api: api.networks())
    configs = [config for network in answer for config in (network.get("IPAM", {}).get("Config") or [])]
    return [config["Subnet"] for config in configs if config.get("Subnet")]


class Project:
    """Docker Compose project of one home, which can be started and removed."""

    def __init__(self, home: Home, at: Deployment, *, settings: Mapping[str, str], passed: Sequence[str] = ()) -> None:
        """Set the parameters of the project. The containers of the project are not started.

        `passed` has the names of environment variables of this process that the manager receives.
        """
        self._home = home
        self._at = at
        self._settings = settings
        self._passed = passed
        self._log = compose_deployment.folder(home) / "compose.log"
        self._more = compose_deployment.folder(home) / "compose.more.json"

    def up(self, say: Callable[[str], None], *, storage: bool) -> None:
        """Start every service of the project and wait until all services are healthy.

        With `storage`, the project includes its own LocalStack. Raise BackendError with the reason if a service fails.
        After a failure, the containers that have started keep running.
        """
        say("Starting the containers; missing images are pulled, which may take minutes.")
        # The Compose file contains only the names of the passed variables. Compose reads the values of the passed
        # variables from its environment, so the values are not in a file.
        more = {"services": {"manager": {"environment": dict.fromkeys(self._passed)}}}
        self._more.parent.mkdir(parents=True, exist_ok=True)
        self._more.write_text(json.dumps(more))
        profiles = ["--profile", "localstack"] if storage else []
        self._compose(*profiles, "up", "--detach", "--no-build", "--remove-orphans")
        self._wait(say)

    def resume(self, say: Callable[[str], None]) -> None:
        """Start the containers that have ended, and wait until all services are healthy.

        Docker does not restart a container that a command of Docker has killed or stopped. Raise BackendError with the
        reason if a service fails.
        """
        details = self._inspect()
        ended = {name: one["Id"] for name, one in details.items() if _state(one["State"]) in _ENDED}
        for service, container in sorted(ended.items()):
            say(f"{service} has ended and is started again.")
            check_reference("start", container)
        self._wait(say, details.keys() - ended.keys())

    def _wait(self, say: Callable[[str], None], running: Collection[str] = ()) -> None:
        """Wait until all services are healthy. Do not report the services `running`."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        ready = set(running)
        before: dict[str, int] = {}
        while True:
            details = self._inspect()
            states = {service: _state(detail["State"]) for service, detail in details.items()}
            # Docker restarts a container that ends, so the state of the container is rarely "exited". Therefore count
            # the restarts of the container.
            restarts = {service: int(detail["RestartCount"]) for service, detail in details.items()}
            before = {**restarts, **before}
            for service, state in sorted(states.items()):
                if state == "healthy" and service not in ready:
                    ready.add(service)
                    say(f"  {service} is ready")
            if states and all(state == "healthy" for state in states.values()):
                return
            failed = [s for s, state in states.items() if state in (*_ENDED, "paused", "unhealthy")]
            failed += [s for s, n in restarts.items() if n - before[s] >= _RESTARTS]
            if failed or time.monotonic() > deadline_s:
                missing = failed or sorted(s for s in states if s not in ready)
                raise BackendError(
                    f"{missing[0]} did not become ready: {self.last_line(missing[0])}.",
                    remedy=f"The output of all services is in {self._keep_logs()}.",
                )
            time.sleep(_POLL_S)

    def states(self) -> dict[str, str]:
        """Return the health of each service, such as "healthy", or the state of a service that does not run."""
        return {service: _state(detail["State"]) for service, detail in self._inspect().items()}

    def _inspect(self) -> dict[str, Any]:
        ids = check_reference(
            "ps", "-aq", "--filter", f"label={LABEL}={self._at.project}", "--filter", "label=com.docker.compose.service"
        ).split()
        if not ids:
            return {}
        details = json.loads(check_reference("inspect", *ids))
        return {detail["Config"]["Labels"]["com.docker.compose.service"]: detail for detail in details}

    def last_line(self, service: str) -> str:
        """Return the last line of a service's output for an error message."""
        logs = self._run("logs", "--no-color", "--no-log-prefix", "--tail", "20", service)
        lines = (logs.stdout + logs.stderr).strip().splitlines()
        return lines[-1].strip().rstrip(".") if lines else "it printed no error message"

    def down(self, *, drain_s: float = 0.0) -> None:
        """Stop and remove all parts of the project, including the instances.

        The workers of the instances have `drain_s` seconds to return their work. Missing parts of the project are
        ignored.
        """
        # An error while the logs are written, for example on a full disk, must not prevent the removal of a grid.
        with suppress(OSError):
            self._keep_logs()
        self._run("stop", "--timeout", _STOP_S, "manager")
        # Kill the Auto Scaling endpoint first, because the endpoint would replace the instances that end.
        self._run("kill", "asg")
        remove_instances(self._at.project, drain_s=drain_s)
        # Compose does not remove a network that still has containers. `remove_project` removes the networks that
        # Compose has left.
        self._run("--profile", "localstack", "down", "--timeout", _STOP_S, "--volumes", "--remove-orphans")
        remove_project(self._at.project)

    def _keep_logs(self) -> Path:
        path = compose_deployment.folder(self._home) / "services.log"
        logs = self._run("logs", "--no-color", "--timestamps")
        path.write_text(logs.stdout + logs.stderr)
        return path

    def _compose(self, *arguments: str) -> None:
        done = self._run(*arguments)
        with suppress(OSError):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._log.write_text(done.stdout + done.stderr)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            cause = lines[-1].rstrip(".") if lines else f"exit {done.returncode}"
            if unpulled := unpulled_images(lines):
                raise BackendError(
                    f"The image of {unpulled[0]} cannot be pulled: {cause}.",
                    remedy="Without an image registry, build the images with compose/offline/build.sh. The script "
                    "prints the settings that name them.",
                )
            raise BackendError(
                f"Docker Compose failed: {cause}.",
                remedy=f"Its output is in {self._log}. `batchlab doctor --backend localstack` reports missing parts.",
            )

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        files = ["--file", str(installation.folder("compose") / "compose.yaml")]
        if self._more.exists():
            files += ["--file", str(self._more)]
        return subprocess.run(
            ["docker", "compose", *files, "--ansi", "never", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        at = self._at
        return {
            **os.environ,
            **self._settings,
            "BATCHLAB_PROJECT": at.project,
            "COMPOSE_PROJECT_NAME": at.project,
            "BATCHLAB_SUBNET": at.subnet,
            "BATCHLAB_IMAGE": at.image,
            "BATCHLAB_WORKER_IMAGES": ",".join([at.image, *sorted({tag for _, tag in at.pool_images.values()})]),
            "BATCHLAB_USER": at.user,
            "BATCHLAB_HOME_FOLDER": str(self._home.path),
            "BATCHLAB_DOCKER_GROUP": str(_group(os.environ)),
        }


def unpulled_images(lines: Sequence[str]) -> list[str]:
    """Return the services whose images Compose could not pull, according to the output of Compose."""
    parts = ("Container", "Network", "Volume")  # Compose prints " Error " for containers, networks, and volumes too.
    failed = [line.split()[0] for line in lines if " Error " in line]
    return [name for name in failed if name not in parts]


def _state(state: Mapping[str, object]) -> str:
    health = state.get("Health")
    if state.get("Status") == "running" and isinstance(health, dict):
        return str(health.get("Status"))
    return str(state.get("Status"))


def _group(settings: Mapping[str, str]) -> int:
    """Return the group id of Docker's Unix socket, or 0 if the socket is not on this machine."""
    path = Path(settings.get("BATCHLAB_DOCKER_SOCKET") or _SOCKET)
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_gid if stat.S_ISSOCK(status.st_mode) else 0


def check_reference(*arguments: str) -> str:
    """Return the output of a `docker` command. Raise Unreachable if the command fails."""
    done = docker(*arguments)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise Unreachable(
            f"`docker {arguments[0]}` failed: {lines[-1].rstrip('.')}.",
            remedy="Start Docker, and check with `docker info` that you may use it.",
        )
    return done.stdout


def remove_instances(project: str, *, drain_s: float) -> None:
    """Stop the project's instances within `drain_s` seconds and remove their containers."""
    filters = ("--filter", f"label={LABEL}={project}", "--filter", "label=batchlab.instance")
    if drain_s and (ids := check_reference("ps", "-q", *filters).split()):
        docker("stop", "--time", str(math.ceil(drain_s)), *ids)
    if ids := check_reference("ps", "-aq", *filters).split():
        docker("rm", "--force", "--volumes", *ids)


def remove_project(project: str) -> int:
    """Remove all containers, networks, and volumes with the project's label. Return the number of removed resources."""
    with Engine() as engine:
        return len(remove_resources(engine, {LABEL: project}))


@dataclass(frozen=True, slots=True)
class ProjectParts:
    """Numbers of the Docker resources of one Compose project on this machine."""

    project: str
    home: str
    """Path of the grid's home, or "" if the labels of the resources do not name the home."""
    parts: int

    @property
    def is_orphan(self) -> bool:
        """Whether the home of the grid is missing or does not record the project.

        A project without a home, such as the project of a separate `asg serve`, belongs to its user and is not an
        orphan.
        """
        if not self.home:
            return False
        home = Home(Path(self.home))
        if self.project == local_name(home) and home.record() is not None:
            return False  # The containers of pools with images belong to a running grid on `local`.
        try:
            deployment = compose_deployment.read(home)
        except BackendError:
            return False  # The file is damaged or belongs to another user, so the owner of the project is unknown.
        return deployment is None or deployment.project != self.project


def projects() -> list[ProjectParts]:
    """Return every Compose project of batchlab that has resources on this machine. Raise Unreachable if Docker does not
    respond.
    """
    homes: dict[str, str] = {}
    parts: Counter[str] = Counter()
    with Engine() as engine:
        resources = find_resources(engine, {LABEL: None})
    for resource in resources:
        name = resource.labels[LABEL]
        parts[name] += 1
        homes[name] = homes.get(name) or resource.labels.get(HOME_LABEL, "")
    return [ProjectParts(name, homes[name], count) for name, count in sorted(parts.items())]


def unused_images() -> dict[str, int]:
    """Return the sizes in bytes of the images that batchlab has built and no container uses, by tag."""
    with Engine() as engine:
        built = engine.do("List the images", lambda api: api.images(filters={"label": IMAGE_LABEL}))
        containers = engine.do("List the containers", lambda api: api.containers(all=True))
    used = {container["ImageID"] for container in containers}
    return {
        tag: image["Size"]
        for image in built
        if image["Id"] not in used
        # An image of the user that is based on an image of batchlab inherits the label.
        for tag in image["RepoTags"] or ()
        if tag.startswith(f"{REPOSITORY}:")
    }


def remove_image(tag: str) -> None:
    """Remove the tag of an image, and the image if it has no other tag. Raise BackendError if a container uses
    the image."""
    with Engine() as engine:
        engine.do(f"The image {tag}", lambda api: api.remove_image(tag))
