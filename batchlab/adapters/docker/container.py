"""One container in place of an instance: what it is made from, and the calls of its life.

The calls block; `docker_engine.Engine.run` makes them in threads and translates their errors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchlab.adapters.aws.metadata_server import Metadata
from batchlab.adapters.docker.engine import told
from batchlab.adapters.local.processes import INSTANCE_VARIABLE
from batchlab.core.errors import AlreadyExists, BackendError
from batchlab.core.instance_types import Share
from batchlab.core.model import Machine, Market, Pool

if TYPE_CHECKING:
    from docker import APIClient

log = logging.getLogger(__name__)

INSTANCE = "batchlab.instance"
POOL = "batchlab.pool"
TYPE = "batchlab.instance-type"
ZONE = "batchlab.zone"
MARKET = "batchlab.market"
LAUNCHED = "batchlab.launched"
"""Label: epoch seconds of the launch, for the order."""
BOOTED = "batchlab.booted"
"""Label: epoch seconds at which it is to start."""

STOP = "batchlab.stop-signal"
"""Label: what asks it to end; SIGTERM where there is none."""

_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1_000
_HOSTNAME_LENGTH = 63
_LOG_FILES, _LOG_SIZE = "2", "10m"
_SYSTEM: Mapping[str, Any] = {
    "read_only": False,
    # It forgets what is in these when it boots.
    "tmpfs": {"/run": "rw,exec,nosuid,nodev,mode=755", "/run/lock": "rw,noexec,nosuid,nodev"},
    "cap_drop": [],
    # The second is for an Engine in it; the network is its own, as a machine's is.
    "cap_add": ["SYS_ADMIN", "NET_ADMIN"],
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
    "cgroupns": "private",
    "init": False,
}
LIVING = ("running", "paused", "restarting")
_LAG_TRIES, _LAG_S = 40, 0.05
"""What Docker says of one container comes later than its list: for a while one that has ended still
runs there, with an exit code of 0."""
_SIGNALLED = 128
_LAST_SIGNAL = 64


@dataclass(frozen=True, slots=True)
class Template:
    """What a pool's containers are made from, as a launch template is for instances.

    `env` and `labels` are added to those that every instance has. `type` limits a container whose
    group names no instance type; with "" there is no limit. `tmpfs` is what a read-only root
    leaves to write to, by path with mount options; it counts against the memory. Process 1 is
    Docker's init unless `init` is off: a worker in its place would be deaf to SIGTERM until it is
    up, and would have to bury what its tasks leave behind. `stop_s` is what `docker stop` gives
    it, where somebody uses that. With `system` process 1 is the image's own init, systemd, which
    mounts, writes and changes users as on a machine: only for an image that is trusted as one.
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

    @property
    def stop_signal(self) -> str:
        """What asks process 1 to end; systemd takes SIGTERM for something else."""
        return "SIGRTMIN+4" if self.system else "SIGTERM"


def environment(
    template: Template, pool: Pool, instance: str, machine: Machine, kind: str
) -> dict[str, str]:
    """What a container finds in its environment; `kind` is its instance type."""
    return {
        **template.env,
        **dict(pool.env),
        INSTANCE_VARIABLE: instance,
        "BATCHLAB_POOL": pool.name,
        "BATCHLAB_SLOTS": str(pool.slots),
        "BATCHLAB_INSTANCE_TYPE": kind,
        "BATCHLAB_ZONE": machine.zone,
        "BATCHLAB_MARKET": machine.market.value,
    }


def labels(
    pool: Pool, instance: str, machine: Machine, kind: str, launched_s: float, booted_s: float
) -> dict[str, str]:
    """What `metadata_of` and the launcher read again."""
    return {
        INSTANCE: instance,
        POOL: pool.name,
        TYPE: kind,
        ZONE: machine.zone,
        MARKET: machine.market.value,
        LAUNCHED: f"{launched_s:.6f}",
        BOOTED: f"{booted_s:.6f}",
    }


def settings(
    template: Template,
    instance: str,
    share: Share | None,
    env: Mapping[str, str],
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """What Docker is asked for, in the SDK's words; without a share there is no limit."""
    host: dict[str, Any] = {
        "network_mode": template.network,
        "read_only": template.read_only,
        "tmpfs": dict(template.tmpfs),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "pids_limit": template.pids,
        "init": template.init,
        "extra_hosts": dict(template.extra_hosts),
        # An Engine's default log grows until the disk is full.
        "log_config": {
            "type": "json-file",
            "config": {"max-size": _LOG_SIZE, "max-file": _LOG_FILES},
        },
    }
    if template.system:
        host |= _SYSTEM
    if share is not None:
        # Not nano_cpus, which Docker refuses where the machine has fewer.
        host["cpu_period"] = _PERIOD_US
        host["cpu_quota"] = max(_LEAST_QUOTA_US, round(share.cpus * _PERIOD_US))
        # The same figure for both: no swap.
        host["mem_limit"] = host["memswap_limit"] = f"{share.memory_mib}m"
    return {
        "image": template.image,
        "command": list(template.command),
        "hostname": instance[:_HOSTNAME_LENGTH],
        "user": "0:0" if template.system else template.user,
        "environment": dict(env),
        "labels": {**tags, STOP: template.stop_signal},
        "host_config": host,
        "stop_signal": template.stop_signal,
        "tty": template.system,
        "stop_timeout": template.stop_s,
    }


def create(name: str, asked: Mapping[str, Any], api: APIClient) -> str:
    """Create a container with those `settings`; its id. AlreadyExists where the name is taken,
    BackendError where the image is not there."""
    from docker.errors import APIError, ImageNotFound

    host_config = api.create_host_config(**asked["host_config"])
    try:
        made = api.create_container(name=name, **{**asked, "host_config": host_config})
    except ImageNotFound as error:
        raise BackendError(
            f"No such image: {asked['image']}.", remedy="`batchlab grid up` makes or pulls it."
        ) from error
    except APIError as error:
        if error.status_code == 409:
            raise AlreadyExists(f"{told(error)}.") from error
        raise
    return str(made["Id"])


def start(container: str, api: APIClient) -> None:
    """Start it; nothing where it runs."""
    api.start(container)


def signal(container: str, name: str, api: APIClient) -> None:
    """Send a signal; nothing where it has ended, or is not up yet. A paused one wakes for it."""
    from docker.errors import APIError

    try:
        api.kill(container, name)
    except APIError as error:
        if error.status_code not in (404, 409):
            raise


def bury(container: str, log_file: Path, api: APIClient) -> Mapping[str, Any] | None:
    """Keep what a container printed that Docker's list has as ended; its state. None where Docker,
    asked about the container itself, says for some seconds that it lives."""
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
        with log_file.open("wb") as kept:
            for part in api.logs(container, stream=True, follow=False):
                kept.write(part)
    except RequestException:
        raise  # which is an OSError too: Docker does not answer
    except (OSError, APIError) as error:
        log.warning("what %s printed is not kept: %s", container[:12], error)


def how(state: Mapping[str, Any], *, killed: bool) -> str:
    """How a container ended, in the words of the port; `killed` says that it was out of time.

    Docker tells of a death by a signal as 128 more than its number, just as shells do, so a
    program that exits with such a code by itself is taken for killed.
    """
    code = int(state["ExitCode"])
    if state.get("OOMKilled") and code == _SIGNALLED + 9 and not killed:
        return "out of memory"
    if _SIGNALLED < code <= _SIGNALLED + _LAST_SIGNAL:
        return f"exit -{code - _SIGNALLED}"
    return f"exit {code}"


def metadata_of(row: Mapping[str, Any], address: str) -> Metadata:
    """What Docker's list says of a container, as an instance's metadata."""
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
