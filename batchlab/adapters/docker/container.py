"""Settings of a container that acts as an instance, and the calls to create, signal, and inspect the container.

The calls of this module block their thread. `Engine.run` makes the calls of this module in threads and translates the
errors of the calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.metadata_server import Metadata
from batchlab.adapters.docker.engine import error_text
from batchlab.adapters.local.processes import INSTANCE_VARIABLE
from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.instance_types import Share
from batchlab.core.model import Machine, Market, Pool
from batchlab.core.text import process_end

if TYPE_CHECKING:
    from docker import APIClient

log = logging.getLogger(__name__)

INSTANCE = "batchlab.instance"
POOL = "batchlab.pool"
TYPE = "batchlab.instance-type"
ZONE = "batchlab.zone"
MARKET = "batchlab.market"
LAUNCHED = "batchlab.launched"
"""Label with the epoch seconds of the launch. The launch time in the label determines the order of containers."""
BOOTED = "batchlab.booted"
"""Label with the epoch seconds at which the container is to start."""

STOP = "batchlab.stop-signal"
"""Label with the signal that asks the container to stop. A container without the stop signal's label gets SIGTERM."""

_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1_000
_HOSTNAME_LENGTH = 63
_LOG_FILES, _LOG_SIZE = "2", "10m"
_SYSTEM: Mapping[str, Any] = {
    "read_only": False,
    # A machine's runtime folders (such as /run) are empty after a boot.
    "tmpfs": {"/run": "rw,exec,nosuid,nodev,mode=755", "/run/lock": "rw,noexec,nosuid,nodev"},
    "cap_drop": [],
    # NET_ADMIN is for a Docker Engine inside the container. The container has its own network, like a machine.
    "cap_add": ["SYS_ADMIN", "NET_ADMIN"],
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
    "cgroupns": "private",
    "init": False,
}
LIVING = ("running", "paused", "restarting")
_LAG_TRIES, _LAG_S = 40, 0.05
"""Number of tries and interval in seconds until `inspect` agrees with Docker's list of containers.

For some time, Docker's `inspect` may report an ended container as running with the exit code 0.
"""
_SIGNALLED = 128
_LAST_SIGNAL = 64


@dataclass(frozen=True, slots=True)
class Template:
    """Settings of a pool's containers, similar to a launch template of EC2 instances.

    `env` and `labels` are added to the variables and labels that every instance has. `type` limits the resources of a
    container whose group does not name an instance type. With the type "", the resources of a container are unlimited.
    `tmpfs` maps the writable paths under a read-only root to mount options. Files in writable paths use the container's
    memory. `folders` are folders of this machine that the container sees under the same paths. In `command`, the
    instance's id replaces {instance}.

    Process 1 of a container is Docker's init unless `init` is off. A worker as process 1 would ignore SIGTERM until the
    worker is ready, and would have to reap the processes that its tasks leave behind. `stop_s` is the timeout of
    `docker stop`. With `system`, process 1 is the image's systemd, which may mount, write, and change users as on a
    machine. Use `system` only for a trusted image.
    """

    image: str
    command: tuple[str, ...]
    network: str = "bridge"
    env: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    type: str = ""
    user: str = "65534:65534"
    read_only: bool = True
    tmpfs: Mapping[str, str] = field(
        default_factory=lambda: {"/tmp": "rw,exec,nosuid,nodev,mode=1777,size=1g"}  # noqa: S108
    )
    pids: int = 1024
    init: bool = True
    extra_hosts: Mapping[str, str] = field(default_factory=dict)
    stop_s: int = 30
    system: bool = False
    gpus: int = 0
    """GPUs of this machine that the container sees."""
    folders: tuple[str, ...] = ()

    @property
    def stop_signal(self) -> str:
        """Return the signal that asks process 1 to stop. systemd does not stop on SIGTERM."""
        return "SIGRTMIN+4" if self.system else "SIGTERM"


def container_environment(template: Template, pool: Pool, instance: str, machine: Machine, kind: str) -> dict[str, str]:
    """Return the environment variables of a container. `kind` is the instance type of the container."""
    return {
        **template.env,
        **dict(pool.env),
        INSTANCE_VARIABLE: instance,
        "BATCHLAB_POOL": pool.name,
        "BATCHLAB_SLOTS": str(pool.slots),
        "BATCHLAB_GPUS": str(pool.gpus),
        "BATCHLAB_INSTANCE_TYPE": kind,
        "BATCHLAB_ZONE": machine.zone,
        "BATCHLAB_MARKET": machine.market.value,
    }


def instance_labels(
    pool: Pool, instance: str, machine: Machine, kind: str, launched_s: float, booted_s: float
) -> dict[str, str]:
    """Return the container labels that `metadata_of` and the launcher read."""
    return {
        INSTANCE: instance,
        POOL: pool.name,
        TYPE: kind,
        ZONE: machine.zone,
        MARKET: machine.market.value,
        LAUNCHED: f"{launched_s:.6f}",
        BOOTED: f"{booted_s:.6f}",
    }


def container_settings(
    template: Template, instance: str, share: Share | None, env: Mapping[str, str], tags: Mapping[str, str]
) -> dict[str, Any]:
    """Return the parameters of a container, in the form of Docker's SDK.

    `share` limits the CPUs and the memory of the container. Without `share`, the container's resources are unlimited.
    """
    host: dict[str, Any] = {
        "network_mode": template.network,
        "read_only": template.read_only,
        "tmpfs": dict(template.tmpfs),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "pids_limit": template.pids,
        "init": template.init,
        "extra_hosts": dict(template.extra_hosts),
        # The default log driver of a Docker Engine stores output without a limit.
        "log_config": {"type": "json-file", "config": {"max-size": _LOG_SIZE, "max-file": _LOG_FILES}},
    }
    if template.system:
        host |= _SYSTEM
    if template.gpus:
        # The request is the one of `docker run --gpus N`.
        host["device_requests"] = [{"Driver": "", "Count": template.gpus, "Capabilities": [["gpu"]]}]
    if template.folders:
        host["binds"] = {folder: {"bind": folder, "mode": "rw"} for folder in template.folders}
    if share is not None:
        # Docker refuses nano_cpus above the number of the machine's CPUs.
        host["cpu_period"] = _PERIOD_US
        host["cpu_quota"] = max(_LEAST_QUOTA_US, round(share.cpus * _PERIOD_US))
        # If `memswap_limit`, the limit of memory plus swap, equals `mem_limit`, the container cannot swap.
        host["mem_limit"] = host["memswap_limit"] = f"{share.memory_mib}m"
    return {
        "image": template.image,
        "command": [word.replace("{instance}", instance) for word in template.command],
        "hostname": instance[:_HOSTNAME_LENGTH],
        "user": "0:0" if template.system else template.user,
        "environment": dict(env),
        "labels": {**tags, STOP: template.stop_signal},
        "host_config": host,
        "stop_signal": template.stop_signal,
        "tty": template.system,
        "stop_timeout": template.stop_s,
    }


def create_container(name: str, settings: Mapping[str, Any], api: APIClient) -> str:
    """Create a container with these `container_settings` and return its id.

    Raise AlreadyExists if the container's name exists, and BackendError if the image does not exist.
    """
    from docker.errors import APIError, ImageNotFound

    host_config = api.create_host_config(**settings["host_config"])
    try:
        created = api.create_container(name=name, **{**settings, "host_config": host_config})
    except ImageNotFound as error:
        raise BackendError(
            f"The image {settings['image']} does not exist.", remedy="`batchlab grid up` builds or pulls the image."
        ) from error
    except APIError as error:
        if error.status_code == 409:
            raise AlreadyExists(f"{error_text(error)}.") from error
        raise
    return str(created["Id"])


NO_GPU_RUNTIME = ("could not select device driver", "failed to discover GPU vendor")
"""Texts of Docker's errors for a container with GPUs on a machine without NVIDIA's container runtime."""


def start_container(container: str, api: APIClient) -> None:
    """Start the container. Do nothing if the container is running. Raise BackendError if the container needs GPUs, and
    Docker does not have a GPU runtime."""
    from docker.errors import APIError

    try:
        api.start(container)
    except APIError as error:
        if any(text in str(error) for text in NO_GPU_RUNTIME):
            raise BackendError(
                "Docker on this machine cannot give GPUs to containers.",
                remedy="Install the NVIDIA Container Toolkit, or start the grid with BATCHLAB_DOCKER_GPUS=0 to declare "
                "GPUs without devices.",
            ) from error
        raise


def send_signal(container: str, name: str, api: APIClient) -> None:
    """Send a signal to the container.

    Ignore a container that has ended or has not started. A paused container resumes first.
    """
    from docker.errors import APIError

    try:
        api.kill(container, name)
    except APIError as error:
        if error.status_code not in (404, 409):
            raise


def save_end(container: str, log_file: Path, api: APIClient) -> Mapping[str, Any] | None:
    """Save the output of a container that Docker lists as ended, and return its state.

    Return None if `inspect` still reports the container as running after some seconds.
    """
    for _ in range(_LAG_TRIES):
        state: Mapping[str, Any] = api.inspect_container(container)["State"]
        if state["Status"] not in LIVING:
            _keep_log(container, log_file, api)
            return state
        time.sleep(_LAG_S)
    return None


def _keep_log(container: str, log_file: Path, api: APIClient) -> None:
    from docker.errors import APIError
    from requests.exceptions import RequestException

    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as file:
            file.writelines(api.logs(container, stream=True, follow=False))
    except RequestException:
        raise  # Docker's timeout error is also an OSError, but means that Docker does not answer.
    except (OSError, APIError) as error:
        log.warning("the output of the container %s cannot be saved: %s", container[:12], error)


def end_text(state: Mapping[str, Any], *, killed: bool) -> str:
    """Return a text about the end of a container. `killed` means that the container was killed at its deadline.

    Docker reports a death by a signal as 128 plus the signal's number, like shells. A program that itself exits with a
    code above 128 therefore counts as killed.
    """
    code = int(state["ExitCode"])
    if state.get("OOMKilled") and code == _SIGNALLED + 9 and not killed:
        return "out of memory"
    if _SIGNALLED < code <= _SIGNALLED + _LAST_SIGNAL:
        code = _SIGNALLED - code
    return process_end(code)


def metadata_of(row: Mapping[str, Any], address: str) -> Metadata:
    """Return an instance's metadata from a container's entry in Docker's list."""
    tags = row["Labels"]
    pool = tags.get(POOL, "")
    return Metadata(
        tags[INSTANCE],
        address,
        Machine(tags.get(TYPE, ""), tags.get(ZONE, ""), Market(tags.get(MARKET, "on-demand"))),
        launched_s=float(tags.get(LAUNCHED, 0)),
        image=row["Image"],
        tags={"aws:autoscaling:groupName": pool, POOL: pool},
    )
