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
    "control_lease_s": "time for which a worker may start tasks of a job after the worker last read the "
    "job's control object. The manager acknowledges the cancellation of a job after "
    "`control_lease_s`",
    "visibility_s": "visibility timeout of a received message. The worker extends the visibility timeout "
    "of a message each time a third of the timeout has passed",
    "silence_s": "time after which the manager searches for the outcome of a planned bundle that workers do "
    "not report. If the bucket does not contain the outcome, the manager sends the bundle again. "
    "`silence_s` must be longer than a worker's `beat_s`. The manager replaces an "
    "instance that sends no heartbeat for three times `silence_s`, and for at least 300 s",
    "lease_ttl_s": "duration of the manager's lease. Another manager takes over if the manager does not "
    "renew its lease for `lease_ttl_s`",
    "tick_s": "interval at which the manager runs the autoscaler and the reconciler, and checks the fleet",
    "wait_s": "longest time that one receive request waits for messages of a queue",
    "drain_target_s": "time in which the fleet should process the backlog. The autoscaler computes the size "
    "of the fleet from `drain_target_s`",
    "cooldown_in_s": "minimum time between two scale-in steps of a pool that has work",
    "idle_s": "time without work after which a pool scales in to its minimum size",
    "boot_tries": "number of consecutive instances of a pool that may fail to start. After `boot_tries` "
    "failed starts, the next launch in the pool waits for `boot_pause_s`",
    "boot_pause_s": "wait before the next launch in a pool after `boot_tries` consecutive instances "
    "failed to start. `boot_pause_s` is 0 on a backend whose fleet limits its launches "
    "itself",
    "max_receives": "number of times that a message may be received without an outcome. After "
    "`max_receives` receives without an outcome, a message moves to the dead-letter queue",
    "window": "number of bundles per task slot that the manager keeps in a pool's queue",
}
"""Meaning of each of the manager's settings."""

WORKER: Mapping[str, str] = {
    "visibility_s": "the setting of a worker has the same meaning as the manager's setting with this name",
    "control_lease_s": "the setting of a worker has the same meaning as the manager's setting with this name",
    "beat_s": "longest interval between two heartbeats of a worker that holds messages",
    "idle_beat_s": "longest interval between two heartbeats of an idle worker",
    "beat_gap_s": "shortest interval between two heartbeats of a worker",
    "wait_s": "longest time that one receive request waits for messages of a queue",
    "drain_s": "time that a draining worker waits for its running tasks to end",
    "hand_over_s": "run time after which the worker hands a bundle over to a watchdog message. "
    "`hand_over_s` is shorter than 12 hours, which is the maximum visibility timeout of "
    "SQS",
    "watchdog_s": "interval at which a worker receives the watchdog message of a long bundle",
    "quick_s": "longest run time of the bundles that a worker prefetches. A worker prefetches one "
    "short bundle per task slot",
}
"""Meaning of each of the worker's settings."""

VARIABLES: Mapping[str, Mapping[str, str]] = {
    "Location of the grid": {
        "BATCHLAB_HOME": "folder of the grid, for commands without `--home`. By default, the grid's folder is "
        "`.batchlab` in the current folder",
        "BATCHLAB_ENDPOINT": "endpoint of S3 and SQS on `ministack` and `localstack`, with the same meaning as the "
        "option `--endpoint`",
        "BATCHLAB_MANAGER_URL": "address of the manager of a stack on AWS. With `BATCHLAB_MANAGER_URL`, clients of "
        "the manager do not connect through Session Manager",
        "BATCHLAB_MINISTACK": "path of an installed MiniStack program. By default, batchlab installs MiniStack into "
        "its cache",
        "BATCHLAB_SYNC": "kind of the writes of a grid on `local` that wait for the disk: `jobs` (default), `all` "
        "(also single calls), or `none` ([durability](backends.md#durability))",
        "XDG_CACHE_HOME": "folder that contains batchlab's cache folder. By default, batchlab's cache folder is "
        "in `~/.cache`",
    },
    "Logs and traces": {
        "BATCHLAB_LOG": "lowest level of the log messages that batchlab writes: `DEBUG`, `INFO` (default), "
        "`WARNING`, or `ERROR`",
        "BATCHLAB_LOG_FORMAT": "format of batchlab's log messages: `text` (default) or `json`, as with the option "
        "`--log-format`",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "URL of the OpenTelemetry receiver to which batchlab sends traces. Without the "
        "URL of a receiver, batchlab does not send traces",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "URL of the receiver of traces, which overrides "
        "`OTEL_EXPORTER_OTLP_ENDPOINT`",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "protocol for sending traces. batchlab supports only `http/protobuf`",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "protocol for sending traces, which overrides "
        "`OTEL_EXPORTER_OTLP_PROTOCOL`",
        "OTEL_EXPORTER_OTLP_HEADERS": "HTTP headers of the requests that send traces, as OpenTelemetry defines. "
        "batchlab does not pass `OTEL_EXPORTER_OTLP_HEADERS` to containers and stacks, "
        "because the headers may contain a key",
        "OTEL_TRACES_EXPORTER": "exporter of traces: `otlp` or `none`",
        "OTEL_SDK_DISABLED": "the value `true` disables all traces",
        "OTEL_SERVICE_NAME": "service name in all traces, instead of `batchlab-manager` and `batchlab-worker`",
        "OTEL_RESOURCE_ATTRIBUTES": "resource attributes of all traces, as OpenTelemetry defines",
        "OTEL_TRACES_SAMPLER": "sampler of traces, as OpenTelemetry defines",
        "OTEL_TRACES_SAMPLER_ARG": "argument of the sampler of traces, as OpenTelemetry defines",
        "OTEL_BSP_SCHEDULE_DELAY": "delay in milliseconds between two exports of traces, as OpenTelemetry defines",
        "TRACEPARENT": "parent span of the trace of a submitted job",
    },
    "Notifications": {
        "BATCHLAB_NOTIFY_SECRET": "secret of a webhook that is configured with `secret: env:BATCHLAB_NOTIFY_SECRET`. "
        "Any other variable whose name begins with `BATCHLAB_NOTIFY_` may contain a "
        "webhook's secret too"
    },
    "`localstack`": {
        "BATCHLAB_IMAGE": "Docker image that contains batchlab. By default, batchlab builds its Docker image",
        "BATCHLAB_BASE_IMAGE": "base image of the Docker image that batchlab builds",
        "BATCHLAB_IMAGE_APT": "Debian packages that the tasks need, which batchlab installs into its Docker image",
        "BATCHLAB_IMAGE_PIP": "PyPI packages that the tasks need, which batchlab installs into its Docker image",
        "BATCHLAB_INSTANCE_SCALE": "share of the CPUs and the memory of its instance type that a container has. By "
        "default, a container has the share 0.5 of its instance type",
        "BATCHLAB_LOCALSTACK_IMAGE": "Docker image of LocalStack",
        "BATCHLAB_LOCALSTACK_PORT": "port of LocalStack. The default port of LocalStack is 4566",
        "BATCHLAB_LOCALSTACK_MEMORY": "memory limit of the LocalStack container. The default memory limit of the "
        "LocalStack container is `2g`",
        "BATCHLAB_LOCALSTACK_CPUS": "CPU limit of the LocalStack container. The default CPU limit of the LocalStack "
        "container is 2 CPUs",
        "BATCHLAB_LOCALSTACK_READ_ONLY": "whether the root file system of the LocalStack container is read-only",
        "BATCHLAB_POSTGRES_IMAGE": "Docker image of PostgreSQL",
        "BATCHLAB_DOCKER_SOCKET": "path of the Docker socket that the Auto Scaling endpoint uses",
        "BATCHLAB_WORKER_IMAGE": "additional Docker image that launch templates may name",
        "BATCHLAB_INSTANCE_IMAGE": "Docker image that boots a whole operating system, which launch templates may name. "
        "`compose/offline/build.sh` sets this variable",
        "BATCHLAB_DEBIAN_MIRROR": "Debian mirror that `compose/offline/build.sh` uses",
        "LOCALSTACK_AUTH_TOKEN": "authentication token of LocalStack, which newer images of LocalStack need",
        "PIP_CERT": "file of the certificates that `pip` trusts while batchlab builds an image",
        "SSL_CERT_FILE": "file of the certificates that other programs trust while batchlab builds an image",
    },
    "`aws`": {
        "AWS_PROFILE": "AWS profile of the credentials. All other environment variables of AWS's tools work too",
        "AWS_REGION": "AWS region, for commands without the option `--region`",
        "AWS_ENDPOINT_URL": "endpoint that batchlab uses instead of the endpoints of AWS. A variable such as "
        "`AWS_ENDPOINT_URL_SQS` replaces the endpoint of one service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "endpoint of the instance metadata service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "IP version of the instance metadata service's endpoint. The value "
        "`IPv6` means that the endpoint of the instance metadata service "
        "uses IPv6",
    },
    "Variables of tasks, commands, and instances": {
        "BATCHLAB_NOTIFICATION": "id of the notification, in the environment of a notification command",
        "BATCHLAB_MOMENT": "moment of the notification, in the environment of a notification command",
        "BATCHLAB_JOB": "id of the notification's job, in the environment of a notification command",
        "BATCHLAB_ATTEMPT": "number of the delivery attempt, counted from 1, in the environment of a notification "
        "command",
        "BATCHLAB_INSTANCE": "id of the instance, in the environment of its worker",
        "BATCHLAB_POOL": "name of the pool that a container belongs to, in the container's environment",
        "BATCHLAB_SLOTS": "number of task slots of a container, in the container's environment",
        "BATCHLAB_INSTANCE_TYPE": "instance type of a container, in the container's environment",
        "BATCHLAB_ZONE": "availability zone of a container, in the container's environment",
        "BATCHLAB_MARKET": "market of a container, `spot` or `on-demand`, in the container's environment",
        "BATCHLAB_LAUNCH_TEMPLATE": "version of the launch template from which an instance was launched",
    },
    "Printed by `grid env`, for other clients": {
        "BATCHLAB_BUCKET": "name of the grid's bucket",
        "BATCHLAB_QUEUES": "prefix of the names of the grid's queues",
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

Other pages describe job files and options. The following table shows the place of each kind of
setting.

| subject | place | page |
| --- | --- | --- |
| a job | the job file, `--set` | [the job file](job-file.md) |
| pools of a grid | `grid up --pool`, `grid scale` | [commands](cli/grid.md#batchlab-grid-up) |
| the manager of a grid | `settings.toml` in the grid's folder | below |
| notifications of a grid | `notify.toml` in the grid's folder | [notifications](notifications.md) |
| a stack on AWS | options or settings file of `deploy plan` | [deploy](deploy.md#options) |
| prices | `prices.toml` in the grid's folder | [costs](costs.md#the-price-book) |

## The manager's settings

The manager reads its settings from `settings.toml` in the grid's folder, below `[manager]`, when
it starts ([details](backends.md#settings-of-a-grid)). A setting whose name ends with `_s` is in
seconds, and all other settings are numbers. The columns of the following table show
the default value of each setting on each backend.

"""
_OF_WORKERS = """
## The workers' settings

The backend's descriptor, `backends/<name>/backend.toml`, contains the settings of the workers.
`settings.toml` does not change the workers' settings. All settings of the workers are in seconds.

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
