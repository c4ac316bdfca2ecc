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
    "control_lease_s": "how long a worker may start tasks of a job after it last read the job's "
    "control object; a cancellation is acknowledged after that time",
    "visibility_s": "visibility timeout of a received message; the worker extends it after each third of it",
    "silence_s": "the manager searches for a planned bundle without an outcome that has been "
    "silent for this time, and sends it again; must be longer than a worker's `beat_s`. It "
    "replaces an instance that is silent for three times as long, and for at least 300 s",
    "lease_ttl_s": "duration of the manager's lease; another manager takes over if the lease is "
    "not renewed for this time",
    "tick_s": "interval at which the autoscaler, the reconciler, and the fleet are checked",
    "wait_s": "longest poll of a queue",
    "drain_target_s": "the fleet is large enough to process the backlog in this time",
    "cooldown_in_s": "minimum time between two scale-in steps",
    "idle_s": "a pool without work for this time scales in to its minimum",
    "boot_tries": "a number: after this many consecutive instances of a pool that failed to start, "
    "the next launch waits for `boot_pause_s`",
    "boot_pause_s": "see `boot_tries`; 0 if the fleet itself limits its launches",
    "max_receives": "a number: a message that was received this often without an outcome moves to "
    "the dead-letter queue",
    "window": "a number: bundles per slot that the manager keeps in the queue",
}
"""Meaning of each of the manager's settings."""

WORKER: Mapping[str, str] = {
    "visibility_s": "same as the manager's",
    "control_lease_s": "same as the manager's",
    "beat_s": "longest interval between heartbeats while the worker holds messages",
    "idle_beat_s": "longest interval between heartbeats of an idle worker",
    "beat_gap_s": "shortest interval between two heartbeats",
    "wait_s": "longest poll of a queue",
    "drain_s": "time that a draining worker gives its running tasks",
    "hand_over_s": "a bundle that runs for this time is handed over to a watchdog message, before "
    "the maximum visibility timeout of SQS, 12 hours",
    "watchdog_s": "interval at which the watchdog message is received",
    "quick_s": "bundles that end within this time are prefetched, one per slot",
}
"""Meaning of each of the worker's settings."""

VARIABLES: Mapping[str, Mapping[str, str]] = {
    "Location of the grid": {
        "BATCHLAB_HOME": "the grid's folder if `--home` is not given; default `.batchlab` in the current folder",
        "BATCHLAB_ENDPOINT": "endpoint of S3 and SQS on `ministack` and `localstack`, as `--endpoint`",
        "BATCHLAB_MANAGER_URL": "address of the manager of a stack on AWS, instead of a connection "
        "through Session Manager",
        "BATCHLAB_MINISTACK": "the program of an installed MiniStack, instead of the one that "
        "batchlab installs into its cache",
        "BATCHLAB_SYNC": "which writes of a grid on `local` wait for the disk: `jobs` (default), "
        "`all` (also single calls), `none` ([durability](backends.md#durability))",
        "XDG_CACHE_HOME": "folder of the cache; default `~/.cache`",
    },
    "Logs and traces": {
        "BATCHLAB_LOG": "the level: `DEBUG`, `INFO` (default), `WARNING`, `ERROR`",
        "BATCHLAB_LOG_FORMAT": "`text` (default) or `json`, as `--log-format`",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "receiver of traces; without it, no traces are sent",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "the same, only for traces",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "`http/protobuf`, the only supported protocol",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "the same, only for traces",
        "OTEL_EXPORTER_OTLP_HEADERS": "as in OpenTelemetry; not passed to containers and stacks, "
        "because it may contain a key",
        "OTEL_TRACES_EXPORTER": "`otlp` or `none`",
        "OTEL_SDK_DISABLED": "`true` disables traces",
        "OTEL_SERVICE_NAME": "replaces `batchlab-manager` and `batchlab-worker`",
        "OTEL_RESOURCE_ATTRIBUTES": "as in OpenTelemetry",
        "OTEL_TRACES_SAMPLER": "as in OpenTelemetry",
        "OTEL_TRACES_SAMPLER_ARG": "as in OpenTelemetry",
        "OTEL_BSP_SCHEDULE_DELAY": "as in OpenTelemetry, in milliseconds",
        "TRACEPARENT": "parent span of a submitted job's trace",
    },
    "Notifications": {
        "BATCHLAB_NOTIFY_SECRET": "contains a webhook's secret, for `secret: "
        "env:BATCHLAB_NOTIFY_SECRET`; any other name that begins with `BATCHLAB_NOTIFY_` is "
        "possible"
    },
    "`localstack`": {
        "BATCHLAB_IMAGE": "the project's image, instead of a new build",
        "BATCHLAB_BASE_IMAGE": "base image of the project's image",
        "BATCHLAB_IMAGE_APT": "Debian packages that tasks need",
        "BATCHLAB_IMAGE_PIP": "PyPI packages that tasks need",
        "BATCHLAB_INSTANCE_SCALE": "a container's share of its instance type; default 0.5",
        "BATCHLAB_LOCALSTACK_IMAGE": "LocalStack's image",
        "BATCHLAB_LOCALSTACK_PORT": "port of LocalStack; default 4566",
        "BATCHLAB_LOCALSTACK_MEMORY": "memory limit of LocalStack; default `2g`",
        "BATCHLAB_LOCALSTACK_CPUS": "CPU limit of LocalStack; default 2",
        "BATCHLAB_LOCALSTACK_READ_ONLY": "whether LocalStack's root file system is read-only",
        "BATCHLAB_POSTGRES_IMAGE": "PostgreSQL's image",
        "BATCHLAB_DOCKER_SOCKET": "Docker socket that the Auto Scaling endpoint uses",
        "BATCHLAB_WORKER_IMAGE": "additional image that launch templates may name",
        "BATCHLAB_INSTANCE_IMAGE": "an image that boots a whole system, for launch templates; set "
        "by `compose/offline/build.sh`",
        "BATCHLAB_DEBIAN_MIRROR": "Debian mirror that `compose/offline/build.sh` uses",
        "LOCALSTACK_AUTH_TOKEN": "authentication token, which newer images of LocalStack need",
        "PIP_CERT": "certificates that `pip` trusts while an image is built",
        "SSL_CERT_FILE": "the same",
    },
    "`aws`": {
        "AWS_PROFILE": "profile of the credentials; all other variables of AWS's tools work too",
        "AWS_REGION": "the region if `--region` is not given",
        "AWS_ENDPOINT_URL": "endpoint that replaces AWS; `AWS_ENDPOINT_URL_SQS` and the like replace one service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "endpoint of the instance metadata service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "`IPv6` if that endpoint uses IPv6",
    },
    "Variables of tasks, commands, and instances": {
        "BATCHLAB_NOTIFICATION": "for a notification command: the notification's id",
        "BATCHLAB_MOMENT": "for a notification command: the moment",
        "BATCHLAB_JOB": "for a notification command: the job",
        "BATCHLAB_ATTEMPT": "for a notification command: the number of the try, from 1",
        "BATCHLAB_INSTANCE": "an instance's id",
        "BATCHLAB_POOL": "for a container: its pool",
        "BATCHLAB_SLOTS": "for a container: its slots",
        "BATCHLAB_INSTANCE_TYPE": "for a container: its instance type",
        "BATCHLAB_ZONE": "for a container: its zone",
        "BATCHLAB_MARKET": "for a container: `spot` or `on-demand`",
        "BATCHLAB_LAUNCH_TEMPLATE": "for an instance: the launch template's version",
    },
    "Printed by `grid env`, for other clients": {
        "BATCHLAB_BUCKET": "the bucket's name",
        "BATCHLAB_QUEUES": "prefix of the names of the queues",
    },
}
"""Variables that a user may set or read, by subject."""

INTERNAL = frozenset(
    {
        "BATCHLAB_PROJECT",
        "BATCHLAB_SUBNET",
        "BATCHLAB_USER",
        "BATCHLAB_HOME_FOLDER",
        "BATCHLAB_DOCKER_GROUP",
        "BATCHLAB_MANAGER_COMMAND",
        "BATCHLAB_NOTIFY_",
    }
)
"""Variables that `grid up` sets for its compose file, and a prefix. Users do not set them."""

_WORDS = """\

# Settings and variables

Job files and options are described on other pages. This table shows where each kind of setting
belongs.

| subject | place | page |
| --- | --- | --- |
| a job | the job file, `--set` | [the job file](job-file.md) |
| pools of a grid | `grid up --pool`, `grid scale` | [commands](cli.md#batchlab-grid-up) |
| the manager of a grid | `settings.toml` in the grid's folder | below |
| notifications of a grid | `notify.toml` in the grid's folder | [notifications](notifications.md) |
| a stack on AWS | `deploy plan`, its settings file | [deploy](deploy.md#options) |
| prices | `prices.toml` in the grid's folder | [costs](costs.md#the-price-book) |

## The manager's settings

The manager reads these settings from `settings.toml` in the grid's folder, below `[manager]`, when
it starts ([details](backends.md#settings-of-a-grid)). They are in seconds, unless the meaning says
that they are a number. The columns show the default of each backend.

"""
_OF_WORKERS = """
## The workers' settings

The backend's descriptor, `backends/<name>/backend.toml`, contains these settings. `settings.toml`
does not change them. They are in seconds.

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
    return [(f"`{name}`", *(f"{one[name]:g}" for one in of), meaning) for name, meaning in meanings.items()]
