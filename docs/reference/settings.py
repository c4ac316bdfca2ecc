"""Reference of settings and environment variables.

Invariant: the page contains every field of the manager's and the worker's settings with its default
on each backend, and every variable that the code reads (a test compares them with the code).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from batchlab.runtime import factory
from docs.reference.capabilities import ORDER
from docs.reference.markdown import head, table

MANAGER: Mapping[str, str] = {
    "control_lease_s": "time for which a worker may start tasks after it last read the job's control object. A "
    "cancellation is acknowledged after this time",
    "visibility_s": "visibility timeout of a received message, which the worker extends; measured run times change it",
    "silence_s": "time without news of a bundle after which the manager searches for its outcome, or sends it again. "
    "Must be longer than `beat_s`. An instance without a heartbeat for three times this time (at least 300 s) "
    "is replaced",
    "lease_ttl_s": "duration of the manager's lease, after which another manager may take over",
    "tick_s": "interval of the autoscaler, the reconciler, and the check of the fleet",
    "wait_s": "longest wait of one receive request",
    "drain_target_s": "time in which the fleet should process the backlog, which determines the fleet's size",
    "cooldown_in_s": "minimum time between two scale-in steps of a pool that has work",
    "idle_s": "time without work after which a pool shrinks to its minimum size",
    "boot_tries": "number of consecutive failed starts of a pool's instances before launches pause",
    "boot_pause_s": "first pause of launches after `boot_tries` failed starts. With 0, the fleet limits its launches "
    "itself",
    "max_receives": "number of receives without an outcome before a message becomes a dead letter",
    "window": "number of bundles per task slot that the manager keeps in a pool's queue",
    "copy_after_s": "minimum run time of a bundle before it gets a [speculative copy](concepts.md#speculative-copies)",
    "orphan_s": "time without a leading manager after which [the fleet ends](deploy.md#without-a-manager). With 0, the "
    "fleet does not end. Without effect on backends whose fleet ends with the manager",
}
"""Meaning of each of the manager's settings."""

WORKER: Mapping[str, str] = {
    "visibility_s": "as above",
    "control_lease_s": "as above",
    "beat_s": "longest interval between two heartbeats of a worker that holds messages",
    "idle_beat_s": "longest interval between two heartbeats of an idle worker",
    "beat_gap_s": "shortest interval between two heartbeats of a worker",
    "wait_s": "as above",
    "drain_s": "time that a draining worker waits for its running tasks to end",
    "hand_over_s": "run time after which a watchdog message replaces the message of a bundle, before SQS's limit of "
    "12 hours",
    "watchdog_s": "interval at which a worker receives the watchdog message of a long bundle",
    "quick_s": "longest run time of the bundles that a worker prefetches, one for each task slot",
    "value_cache_bytes": "size in bytes of the values of `Grid.put` that an instance stores on its disk. The values "
    "that were used least recently are removed first",
}
"""Meaning of each of the worker's settings."""

VARIABLES: Mapping[str, Mapping[str, str]] = {
    "The grid": {
        "BATCHLAB_HOME": "grid's folder, instead of `.batchlab` in the current folder",
        "BATCHLAB_URL": "address of a grid's manager, for commands without the grid's folder (needs `BATCHLAB_TOKEN`)",
        "BATCHLAB_TOKEN": "token of a [user](security.md#users), with `BATCHLAB_URL`",
        "BATCHLAB_ENDPOINT": "as the option `--endpoint`",
        "BATCHLAB_MANAGER_URL": "address of the manager of a stack, instead of a connection through Session Manager",
        "BATCHLAB_MINISTACK": "path of an installed MiniStack program",
        "BATCHLAB_SYNC": "writes that wait for the disk on `local`: `jobs` (default), `all`, or `none` "
        "([durability](backends.md#durability))",
        "BATCHLAB_PORTABLE": "for tests on Linux: `1` replaces the calls that only Linux has, as on "
        "[macOS](install.md#macos-and-windows)",
        "XDG_CACHE_HOME": "parent of batchlab's cache folder, instead of `~/.cache`",
    },
    "Logs and traces": {
        "BATCHLAB_LOG": "lowest level of log messages: `DEBUG`, `INFO` (default), `WARNING`, or `ERROR`",
        "BATCHLAB_LOG_FORMAT": "`text` (default) or `json`, as the option `--log-format`",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "URL of the receiver of traces. Without this URL, batchlab sends no traces",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "URL of the receiver that overrides the previous variable",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "must be `http/protobuf`",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "must be `http/protobuf`",
        "OTEL_EXPORTER_OTLP_HEADERS": "HTTP headers for the receiver. Not passed to containers and stacks, because the "
        "headers may contain a key",
        "OTEL_TRACES_EXPORTER": "`otlp` or `none`",
        "OTEL_SDK_DISABLED": "`true` disables all traces",
        "OTEL_SERVICE_NAME": "service name, instead of `batchlab-manager` and `batchlab-worker`",
        "OTEL_RESOURCE_ATTRIBUTES": "resource attributes, as OpenTelemetry defines",
        "OTEL_TRACES_SAMPLER": "sampler, as OpenTelemetry defines",
        "OTEL_TRACES_SAMPLER_ARG": "sampler's argument, as OpenTelemetry defines",
        "OTEL_BSP_SCHEDULE_DELAY": "milliseconds between two exports, as OpenTelemetry defines",
        "TRACEPARENT": "parent span of a submitted job",
    },
    "Notifications": {
        "BATCHLAB_NOTIFY_SECRET": "secret of a webhook with `secret: env:BATCHLAB_NOTIFY_SECRET`; so is any variable "
        "whose name begins with `BATCHLAB_NOTIFY_`"
    },
    "`localstack`": {
        "BATCHLAB_IMAGE": "existing image of the grid, instead of an image built from the installed code",
        "BATCHLAB_BASE_IMAGE": "base of the built image, instead of `python:X.Y-slim` with the command's Python "
        "version; a digest fixes it",
        "BATCHLAB_IMAGE_APT": "Debian packages that tasks need in the built image (default `ffmpeg`)",
        "BATCHLAB_IMAGE_PIP": "PyPI packages that tasks need in the built image",
        "BATCHLAB_INSTANCE_SCALE": "share of its instance type that a container gets (default 0.5: an m7i.large gets "
        "one CPU and 4 GiB)",
        "BATCHLAB_LOCALSTACK_IMAGE": "image of LocalStack (default `localstack/localstack:4.14.0`)",
        "BATCHLAB_LOCALSTACK_PORT": "port of LocalStack (default 4566)",
        "BATCHLAB_LOCALSTACK_MEMORY": "memory limit of LocalStack (default `2g`)",
        "BATCHLAB_LOCALSTACK_CPUS": "CPU limit of LocalStack (default 2)",
        "BATCHLAB_LOCALSTACK_READ_ONLY": "`true` makes LocalStack's root read-only, as the offline image allows",
        "BATCHLAB_POSTGRES_IMAGE": "image of PostgreSQL (default `postgres:17`)",
        "BATCHLAB_DOCKER_SOCKET": "Docker's socket for the Auto Scaling endpoint (default `/var/run/docker.sock`)",
        "BATCHLAB_WORKER_IMAGE": "additional image that launch templates may name",
        "BATCHLAB_INSTANCE_IMAGE": "image of a whole operating system, which launch templates may name; "
        "`compose/offline/build.sh` sets it",
        "BATCHLAB_DEBIAN_MIRROR": "Debian mirror of `compose/offline/build.sh`",
        "BATCHLAB_DOCKER_GPUS": "with `0`, containers get no devices for the GPUs that their pool declares",
        "LOCALSTACK_AUTH_TOKEN": "token that newer images of LocalStack need",
        "PIP_CERT": "certificates that `pip` trusts during the build, if a proxy intercepts TLS",
        "SSL_CERT_FILE": "certificates that other programs trust during the build",
    },
    "`aws`": {
        "AWS_PROFILE": "profile of the credentials. All variables of AWS's tools work",
        "AWS_REGION": "region, without the option `--region`",
        "AWS_ENDPOINT_URL": "endpoint instead of AWS. A variable such as `AWS_ENDPOINT_URL_SQS` replaces the endpoint "
        "of one service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "endpoint of the instance metadata service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "`IPv6` for an IPv6 endpoint",
    },
    "Variables that batchlab sets": {
        "BATCHLAB_NOTIFICATION": "id of the notification, for a notification command",
        "BATCHLAB_MOMENT": "moment of the notification, for a notification command",
        "BATCHLAB_JOB": "job of the notification, for a notification command",
        "BATCHLAB_ATTEMPT": "number of the delivery attempt from 1, for a notification command",
        "BATCHLAB_INSTANCE": "id of a worker's instance",
        "BATCHLAB_POOL": "pool of a container",
        "BATCHLAB_SLOTS": "task slots of a container",
        "BATCHLAB_GPUS": "GPUs of a container",
        "BATCHLAB_INSTANCE_TYPE": "instance type of a container",
        "BATCHLAB_ZONE": "availability zone of a container",
        "BATCHLAB_MARKET": "market of a container, `spot` or `on-demand`",
        "BATCHLAB_LAUNCH_TEMPLATE": "version of an instance's launch template",
        "BATCHLAB_BUCKET": "name of the grid's bucket, printed by `grid env`",
        "BATCHLAB_QUEUES": "prefix of the names of the grid's queues, printed by `grid env`",
    },
}
"""Variables that a user may set or read, by subject."""

INTERNAL = frozenset(
    {
        "BATCHLAB_GRID",
        "BATCHLAB_POOL_IMAGE",
        "BATCHLAB_PROJECT",
        "BATCHLAB_WORKER_IMAGES",
        "BATCHLAB_SUBNET",
        "BATCHLAB_USER",
        "BATCHLAB_HOME_FOLDER",
        "BATCHLAB_DOCKER_GROUP",
        "BATCHLAB_MANAGER_COMMAND",
        "BATCHLAB_NOTIFY_",
    }
)
"""Variables that `grid up` sets for its compose file and for workers, and a prefix. Users do not set them."""

_WORDS = """\

# Settings and variables

| subject | place | page |
| --- | --- | --- |
| a job | the job file, `--set` | [the job file](job-file.md) |
| pools of a grid | `grid up --pool`, `grid scale` | [commands](cli/grid.md#batchlab-grid-up) |
| the manager of a grid | `settings.toml` in the grid's folder | below |
| notifications of a grid | `notify.toml` in the grid's folder | [notifications](notifications.md) |
| a stack on AWS | options or settings file of `deploy plan` | [deploy](deploy.md#options) |
| prices | `prices.toml` in the grid's folder | [costs](costs.md#the-price-book) |

## The manager's settings

The manager reads `settings.toml` in the grid's folder, below `[manager]`, when it starts
([example](backends.md#settings-of-a-grid)). A name with `_s` at the end means seconds. The columns
show the default of each backend.

"""
_OF_WORKERS = """
## The workers' settings

The backend's descriptor, `backends/<name>/backend.toml`, contains these settings. Times are in seconds.
`settings.toml` does not change them.

"""
_OF_VARIABLES = """
## Environment variables
"""


def reference() -> str:
    """The page in Markdown."""
    found = [factory.load(name, None) for name in ORDER]
    columns = ("setting", *(f"`{name}`" for name in ORDER), "meaning")
    managers = [asdict(one.manager) for one in found]
    workers = [asdict(one.worker) for one in found]
    pages = [
        head("the manager's and the workers' settings, and docs/reference/settings.py"),
        _WORDS,
        table(columns, _rows(MANAGER, managers)),
        _OF_WORKERS,
        table(columns, _rows(WORKER, workers)),
        _OF_VARIABLES,
    ]
    for title, variables in VARIABLES.items():
        rows = [(f"`{name}`", meaning) for name, meaning in variables.items()]
        pages.append(f"\n### {title}\n\n" + table(("variable", "meaning"), rows))
    return "".join(pages)


def _rows(meanings: Mapping[str, str], of: list[dict[str, float]]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", *(f"{one[name]:.10g}" for one in of), meaning) for name, meaning in meanings.items()]
