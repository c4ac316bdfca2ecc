"""The reference of settings and environment variables.

Invariant: every field of the manager's and the worker's settings is in it, with what each backend
has; and every variable that the code reads, which a test looks for in the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from batchlab.runtime import factory
from docs.reference.capabilities import ORDER
from docs.reference.markdown import head, table

MANAGER: Mapping[str, str] = {
    "control_lease_s": "how long a worker may start tasks of a job after it last looked at the "
    "job's control object; a cancellation is acknowledged after that long",
    "visibility_s": "how long a received message is hidden from others; extended at a third of it",
    "silence_s": "a bundle that is planned, uncommitted and silent for so long is looked for and "
    "sent again; more than a worker's `beat_s`. An instance that is silent for three times as "
    "long, and for 300 s at least, is replaced",
    "lease_ttl_s": "a manager that has not renewed its lease for so long is replaced by the next",
    "tick_s": "how often the autoscaler, the reconciler and the fleet are looked at",
    "wait_s": "the longest poll of a queue",
    "drain_target_s": "the fleet is as large as would do the backlog in this time",
    "cooldown_in_s": "at least so long between two steps down",
    "idle_s": "without work for so long, a pool goes to its least size",
    "boot_tries": "a number: after so many instances of a pool in a row that did not come up, the "
    "next is tried after `boot_pause_s`",
    "boot_pause_s": "see `boot_tries`; 0 where the fleet slows itself down",
    "max_receives": "a number: received so often without an outcome, a message is a dead letter",
    "window": "a number: bundles per slot that are kept in the queue",
}
"""What each of the manager's settings means."""

WORKER: Mapping[str, str] = {
    "visibility_s": "as the manager's",
    "control_lease_s": "as the manager's",
    "beat_s": "the longest silence towards the manager while something is in hand",
    "idle_beat_s": "the same while nothing is",
    "beat_gap_s": "the least time between two beats",
    "wait_s": "the longest poll of a queue",
    "drain_s": "what a draining worker gives its running tasks",
    "hand_over_s": "so long after its receive a running bundle is handed over to a watchdog "
    "message, before SQS's cap of 12 hours",
    "watchdog_s": "how often the watchdog comes back",
    "quick_s": "bundles that end within this time are prefetched, one per slot",
}
"""What each of the worker's settings means."""

VARIABLES: Mapping[str, Mapping[str, str]] = {
    "Where the grid is": {
        "BATCHLAB_HOME": "the grid's folder where `--home` does not say it; `.batchlab` here "
        "unless set",
        "BATCHLAB_ENDPOINT": "S3 and SQS on `ministack` and `localstack`, as `--endpoint`",
        "BATCHLAB_MANAGER_URL": "another way to the manager of a stack on AWS than a session of "
        "Session Manager",
        "BATCHLAB_MINISTACK": "the program of an installed MiniStack, in place of one that is "
        "installed into the cache",
        "BATCHLAB_SYNC": "the writes of a grid on `local` that wait for the disk: `jobs` (unless "
        "set), `all` (single calls too), `none` ([durability](backends.md#durability))",
        "XDG_CACHE_HOME": "where that cache is; `~/.cache` unless set",
    },
    "Logs and traces": {
        "BATCHLAB_LOG": "the level: `DEBUG`, `INFO` (unless set), `WARNING`, `ERROR`",
        "BATCHLAB_LOG_FORMAT": "`text` (unless set) or `json`, as `--log-format`",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "where traces go; without it there are none",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "the same for traces alone",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "`http/protobuf`, the only one that is spoken",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "the same for traces alone",
        "OTEL_EXPORTER_OTLP_HEADERS": "OpenTelemetry's own; not passed on into containers and "
        "stacks, since it may hold a key",
        "OTEL_TRACES_EXPORTER": "`otlp` or `none`",
        "OTEL_SDK_DISABLED": "`true`: no traces",
        "OTEL_SERVICE_NAME": "in place of `batchlab-manager` and `batchlab-worker`",
        "OTEL_RESOURCE_ATTRIBUTES": "OpenTelemetry's own",
        "OTEL_TRACES_SAMPLER": "OpenTelemetry's own",
        "OTEL_TRACES_SAMPLER_ARG": "OpenTelemetry's own",
        "OTEL_BSP_SCHEDULE_DELAY": "OpenTelemetry's own, milliseconds",
        "TRACEPARENT": "the span that a submitted job's trace belongs to",
    },
    "Notifications": {
        "BATCHLAB_NOTIFY_SECRET": "a name to keep a webhook's secret under: `secret: "
        "env:BATCHLAB_NOTIFY_SECRET`; any other that begins with `BATCHLAB_NOTIFY_` does too",
    },
    "`localstack`": {
        "BATCHLAB_IMAGE": "the project's image, in place of one that is built",
        "BATCHLAB_BASE_IMAGE": "what the project's image is built from",
        "BATCHLAB_IMAGE_APT": "Debian's packages for tasks",
        "BATCHLAB_IMAGE_PIP": "PyPI's packages for tasks",
        "BATCHLAB_INSTANCE_SCALE": "a container's share of its instance type; 0.5 unless set",
        "BATCHLAB_LOCALSTACK_IMAGE": "LocalStack's image",
        "BATCHLAB_LOCALSTACK_PORT": "its port; 4566 unless set",
        "BATCHLAB_LOCALSTACK_MEMORY": "its limit of memory; `2g` unless set",
        "BATCHLAB_LOCALSTACK_CPUS": "its limit of processors; 2 unless set",
        "BATCHLAB_LOCALSTACK_READ_ONLY": "whether its root is read-only",
        "BATCHLAB_POSTGRES_IMAGE": "PostgreSQL's image",
        "BATCHLAB_DOCKER_SOCKET": "what the Auto Scaling endpoint speaks to",
        "BATCHLAB_WORKER_IMAGE": "one more image that launch templates may name",
        "BATCHLAB_INSTANCE_IMAGE": "an image that boots a whole system, for launch templates; set "
        "by `compose/offline/build.sh`",
        "BATCHLAB_DEBIAN_MIRROR": "where `compose/offline/build.sh` takes Debian from",
        "LOCALSTACK_AUTH_TOKEN": "what LocalStack's newer images need",
        "PIP_CERT": "certificates that `pip` trusts while an image is built",
        "SSL_CERT_FILE": "the same",
    },
    "`aws`": {
        "AWS_PROFILE": "and all else by which AWS's tools find credentials",
        "AWS_REGION": "the region where `--region` does not say it",
        "AWS_ENDPOINT_URL": "what stands in AWS's place; also `AWS_ENDPOINT_URL_SQS` and the like "
        "for one service",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "where an instance asks for its metadata",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE": "`IPv6` where that is so",
    },
    "What tasks, commands and instances find": {
        "BATCHLAB_NOTIFICATION": "of a notifying command: the notification's id",
        "BATCHLAB_MOMENT": "of a notifying command: which moment it is",
        "BATCHLAB_JOB": "of a notifying command: the job",
        "BATCHLAB_ATTEMPT": "of a notifying command: which try this is, from 1",
        "BATCHLAB_INSTANCE": "an instance's id",
        "BATCHLAB_POOL": "of a container: its pool",
        "BATCHLAB_SLOTS": "of a container: its slots",
        "BATCHLAB_INSTANCE_TYPE": "of a container: its instance type",
        "BATCHLAB_ZONE": "of a container: its zone",
        "BATCHLAB_MARKET": "of a container: `spot` or `on-demand`",
        "BATCHLAB_LAUNCH_TEMPLATE": "of an instance: the launch template's version",
    },
    "Printed by `grid env`, for other clients": {
        "BATCHLAB_BUCKET": "the bucket's name",
        "BATCHLAB_QUEUES": "how the names of the queues begin",
    },
}
"""What a user may set or find, by what it is for."""

INTERNAL = frozenset(
    {
        *("BATCHLAB_PROJECT", "BATCHLAB_SUBNET", "BATCHLAB_USER", "BATCHLAB_HOME_FOLDER"),
        *("BATCHLAB_DOCKER_GROUP", "BATCHLAB_MANAGER_COMMAND"),
        "BATCHLAB_NOTIFY_",
    }
)
"""What `grid up` sets for its own compose file, and what is no whole name; nobody else does."""

_WORDS = """\

# Settings and variables

What can be said beside job files and options, and where it is said.

| what | where | page |
| --- | --- | --- |
| a job | the job file, `--set` | [the job file](job-file.md) |
| pools of a grid | `grid up --pool`, `grid scale` | [commands](cli.md#batchlab-grid-up) |
| how a grid's manager behaves | `settings.toml` in the grid's folder | below |
| whom a grid notifies | `notify.toml` in the grid's folder | [notifications](notifications.md) |
| a stack on AWS | `deploy plan`, its settings file | [deploy](deploy.md#options) |
| prices | `prices.toml` in the grid's folder | [costs](costs.md#the-price-book) |

## The manager's settings

`settings.toml` in a grid's folder, below `[manager]`; read when the manager starts ([more on
it](backends.md#settings-of-a-grid)). Seconds, unless it says that it is a number. The columns are
what each backend has unless told otherwise.

"""
_OF_WORKERS = """
## The workers' settings

They belong to the backend's descriptor, `backends/<name>/backend.toml`, and are not read from
`settings.toml`. Seconds.

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
    return [
        (f"`{name}`", *(f"{one[name]:g}" for one in of), meaning)
        for name, meaning in meanings.items()
    ]
