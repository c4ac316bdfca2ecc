"""The one composition root: a backend's descriptor, and the adapters it names.

A backend is a named choice of adapters, written down as data in `backends/<name>/backend.toml`.
Adapters are imported here and nowhere else, each only when it is named.
"""

from __future__ import annotations

import logging
import os
import random
import re
import secrets
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from batchlab import package_data
from batchlab.adapters.awsgrid import deployment as stacks
from batchlab.adapters.awsgrid.deployment import AwsDeployment
from batchlab.adapters.compose import deployment
from batchlab.adapters.compose.deployment import Deployment
from batchlab.costs.requests import Pace
from batchlab.errors import Unreachable, UsageError
from batchlab.home import Home, Place
from batchlab.manager.live import ManagerSettings
from batchlab.manager.notifying import Deliver
from batchlab.model import Pool
from batchlab.patience import Patience
from batchlab.ports import Clock, Ids, Ledger, Objects
from batchlab.scenario.model import Calibration
from batchlab.tally import Tally
from batchlab.tracing import NOBODY, Tracer
from batchlab.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from batchlab.adapters.docker import ContainerLauncher
    from batchlab.adapters.ec2_drain import DrainHook
    from batchlab.adapters.imds import Imds
    from batchlab.adapters.imds_tree import Signals
    from batchlab.adapters.ministack import Emulator
    from batchlab.adapters.process import ProcessLauncher
    from batchlab.adapters.rung import RungQueue
    from batchlab.adapters.sqlite_queue import SqliteQueue
    from batchlab.adapters.sqs import SqsQueue
    from batchlab.asg.running import AsgSettings
    from batchlab.asg.templates import TemplateFile
    from batchlab.ports import Fleet
    from batchlab.report.writing import Writer

log = logging.getLogger(__name__)


VARIABLE = "BATCHLAB_ENDPOINT"
"""Environment variable that names an endpoint where no option does."""

_ENDPOINT = re.compile(
    r"(?P<url>https?://[^/?#@\s]+)/?(?P<bucket>[a-z0-9][a-z0-9-]{1,26}[a-z0-9])?/?"
)
# The bucket's name begins the names of queues, of which SQS takes 80 characters without dots; that
# of a pool's dead letters takes 51 of them.


@dataclass(frozen=True, slots=True)
class Image:
    """What is put into the containers for the users' tasks: Debian's packages and PyPI's."""

    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Backend:
    """A descriptor as read from its file."""

    name: str
    description: str
    objects: str
    queue: str
    ledger: str
    fleet: str
    manager: ManagerSettings
    worker: WorkerSettings
    pools: tuple[Pool, ...]
    emulator: str | None = None
    """What is started where no endpoint is named."""
    endpoint: str | None = None
    """What the user has named: a URL, perhaps with a bucket as its path."""
    runs_in: str = "processes"
    """What manager and workers are: "processes" of this machine, "containers", or instances that a
    stack on "aws" has made."""
    image: Image = Image()
    usual: Calibration = field(default_factory=lambda: Calibration(""))
    """What a forecast takes of it where nothing was calibrated."""

    @property
    def is_one_machine(self) -> bool:
        """Whether its instances are processes of this machine: they are in no market and in no
        zone, they share a disk, and nobody starts a manager again but whoever wants one."""
        return self.fleet == "process"

    @property
    def keeps_home(self) -> bool:
        """Whether a manager finds the home of the one before it, and in that whose lease need not
        run out. The next one of a stack is on another instance."""
        return self.fleet != "simulated" and not self.is_deployed

    @property
    def keeps_files(self) -> bool:
        """Whether the bucket is a folder in the home, to be read without anybody's help."""
        return self.objects == "files"

    @property
    def pace(self) -> Pace:
        """How often its workers ask, by which requests are derived where none are counted."""
        manager, worker = self.manager, self.worker
        return Pace(worker.control_lease_s, worker.visibility_s, worker.beat_s, manager.tick_s)

    def open_clock(self) -> Clock:
        from batchlab.adapters.clock import WallClock

        return WallClock()

    def open_tracer(self, service: str, instance: str) -> Tracer:
        """Where the traces of this process go, as the environment says; nowhere unless it does."""
        if not _is_traced(os.environ):
            return NOBODY
        try:
            from batchlab.adapters.otel import OtelTracer
        except ImportError:
            log.warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set, but batchlab's extra `otel` is not installed, "
                "so there are no traces: pip install 'batchlab[otel]' brings it"
            )
            return NOBODY
        return OtelTracer(f"batchlab-{service}", instance)

    def open_deliveries(self, home: Home, clock: Clock) -> Deliver:
        """The ways to who is notified."""
        from batchlab.adapters.aws import Endpoint
        from batchlab.adapters.notify import Deliveries

        def endpoint_of(region: str) -> Endpoint:
            """Where an emulator is the grid's AWS, it is asked too."""
            is_aws = self.is_deployed or self.keeps_files
            return Endpoint(None if is_aws else self.place(home).url, region)

        return Deliveries(clock, endpoint_of)

    def open_ids(self) -> Ids:
        from batchlab.adapters.clock import RandomIds

        return RandomIds()

    def open_objects(self, home: Home, tally: Tally | None = None) -> Objects:
        """The bucket, asked as `tally` counts; Unreachable where no grid has been up yet."""
        if self.keeps_files:
            from batchlab.adapters.objects import open_local

            home.make()
            return open_local(home.objects)
        _only("objects", self.objects, "s3")
        from batchlab.adapters.aws import Endpoint
        from batchlab.adapters.objects import open_s3

        if self.is_deployed:
            at = self.stack(home)
            return open_s3(Endpoint(region=at.region), at.bucket, tally)
        place = self.place(home)
        return open_s3(Endpoint(place.url), place.bucket, tally)

    def open_queue(
        self, home: Home, clock: Clock, tally: Tally | None = None
    ) -> SqliteQueue | RungQueue | SqsQueue:
        """The queues; as `open_objects`."""
        if self.queue == "sqlite":
            from batchlab.adapters.sqlite_queue import SqliteQueue

            home.make()
            return SqliteQueue(home.queue_file, clock)
        _only("queue", self.queue, "sqs")
        from batchlab.adapters.aws import Endpoint
        from batchlab.adapters.rung import RungQueue
        from batchlab.adapters.sqs import SqsQueue

        if self.is_deployed:
            at = self.stack(home)
            return SqsQueue(Endpoint(region=at.region), prefix=at.prefix, makes=False, tally=tally)
        place = self.place(home)
        queue = SqsQueue(Endpoint(place.url), prefix=f"{place.bucket}-", tally=tally)
        if self.fleet != "process":
            return queue
        # Its instances are processes of this machine, as are those who submit.
        return RungQueue(queue, home.of(self.name) / "wake")

    def open_ledger(self, home: Home) -> Ledger:
        if self.ledger == "postgres":
            from batchlab.adapters.sql import open_postgres

            at = self.deployment(home)
            return open_postgres(at.postgres_url(deployment.password_file(home).read_text()))
        if self.is_deployed:
            from batchlab.adapters.awsgrid.ledger import open_ledger

            stacks.folder(home).mkdir(parents=True, exist_ok=True)
            return open_ledger(self.stack(home), stacks.folder(home) / home.ledger_file.name)
        _only("ledger", self.ledger, "sqlite")
        from batchlab.adapters.sql import open_sqlite

        home.make()
        if self.keeps_files:
            return open_sqlite(home.ledger_file)
        home.of(self.name).mkdir(exist_ok=True)
        return open_sqlite(home.of(self.name) / home.ledger_file.name)

    def open_launcher(self, home: Home, clock: Clock) -> ProcessLauncher | None:
        """Who launches instances in this process; None where a service of its own does."""
        if self.fleet == "autoscaling":
            return None
        _only("fleet", self.fleet, "process")
        from batchlab.adapters.process import ProcessLauncher

        def argv(pool: Pool, instance: str) -> Sequence[str]:
            return [
                *(sys.executable, "-P", "-m", "batchlab", "worker"),
                *("--home", str(home.path), "--backend", self.name),
                *("--pool", pool.name, "--slots", str(pool.slots), "--instance", instance),
            ]

        return ProcessLauncher(home.fleet, argv, clock, dict(os.environ))

    def open_fleet(self, home: Home, launcher: ProcessLauncher | None, clock: Clock) -> Fleet:
        if launcher is None:
            from batchlab.adapters.aws import Endpoint
            from batchlab.adapters.ec2_fleet import Ec2Fleet
            from batchlab.adapters.ec2_form import GroupForm

            if self.is_deployed:
                stack = self.stack(home)
                there = Endpoint(region=stack.region)
                return Ec2Fleet(there, clock, None, prefix=stack.groups_prefix)
            at = self.deployment(home)
            form = GroupForm(deployment.TEMPLATE, zones=deployment.ZONES)
            return Ec2Fleet(Endpoint(at.autoscaling_url), clock, form, prefix=f"{at.project}-")
        from batchlab.adapters.state_file import StateFile
        from batchlab.fleet.group import ManagedFleet

        return ManagedFleet(
            launcher,
            clock,
            self.open_ids(),
            StateFile(home.fleet / "groups.json"),
            drain_s=self.worker.drain_s + 5.0,
        )

    def open_drain_hook(self, home: Home, pool: str, imds: Imds) -> DrainHook | None:
        """The hook that a worker's instance waits in, for the worker to complete; None where the
        end of the worker ends its instance."""
        if not self.is_deployed:
            return None
        from batchlab.adapters.aws import Endpoint
        from batchlab.adapters.ec2_drain import DrainHook

        at = self.stack(home)
        return DrainHook(Endpoint(region=at.region), f"{at.groups_prefix}{pool}", imds)

    def deployment(self, home: Home) -> Deployment:
        """Where the containers are; Unreachable where there are none."""
        if at := deployment.read(home):
            return at
        raise Unreachable(
            f"No grid on {self.name} is up in {home.path}.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def check_python(self, home: Home) -> None:
        """UsageError unless the instances run on this process's Python: functions travel as
        bytecode, which no other version understands."""
        there, remedy = "", ""
        if self.runs_in == "containers":
            at = deployment.read(home)
            there = at.python if at else ""
            remedy = (
                "Name an image with Python {here} by BATCHLAB_BASE_IMAGE before the grid comes up"
            )
        elif self.is_deployed:
            there = self.stack(home).python
            remedy = "Deploy a release for Python {here} with `batchlab deploy apply`"
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if there and there != here:
            raise UsageError(
                f"The grid's instances run on Python {there}, and this is Python {here}: functions "
                "cannot be sent to them.",
                remedy=f"{remedy.format(here=here)}, or describe the job in a file.",
            )

    # --- The stack on AWS ------------------------------------------------------------------------

    @property
    def is_deployed(self) -> bool:
        """Whether a stack on AWS is the grid: it makes queues and groups, and runs the manager."""
        return self.runs_in == "aws"

    def stack(self, home: Home) -> AwsDeployment:
        """Where the stack's parts are; Unreachable where none is known in this home."""
        if at := stacks.read(home):
            return at
        raise Unreachable(
            f"No stack is known in {home.path}.",
            remedy="`batchlab deploy apply` makes one, `batchlab deploy status --stack NAME` finds "
            "one that is there.",
        )

    def pools_in(self, home: Home) -> tuple[Pool, ...]:
        """The pools of the grid: the stack's, where one is the grid."""
        return self.stack(home).pools if self.is_deployed else self.pools

    def api_token(self, home: Home) -> str:
        """The API's bearer token. That of a stack is in Secrets Manager; it is kept in the home,
        for whoever talks to the manager from there."""
        if self.is_deployed:
            from batchlab.adapters.awsgrid.access import secret_text

            at = self.stack(home)
            home.keep_token(secret_text(at.region, at.token_secret))
        return home.token()

    # --- The endpoint ----------------------------------------------------------------------------

    def place(self, home: Home) -> Place:
        """Where bucket and queues are; Unreachable where the grid has never been up."""
        if place := home.place(self.name):
            return place
        if self.endpoint and (named := _place(self.endpoint)).bucket:
            return named  # an instance knows them from its environment alone
        raise Unreachable(
            f"No grid on {self.name} has been up in {home.path}, so there is no bucket yet.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def provide(self, home: Home, say: Callable[[str], None]) -> None:
        """Do what takes long or may be refused before a manager is started, where the user sees
        it: install the emulator (`say` hears of it), or look whether the named endpoint answers.
        UsageError, BackendError."""
        if named := self.named_place(home):
            from batchlab.adapters.aws import Endpoint, check

            check(Endpoint(named.url))
        elif self.emulator:
            from batchlab.adapters.ministack import provide

            provide(say)

    def named_place(self, home: Home) -> Place | None:
        """The endpoint that the user has named, now or when this home was first used, or a front
        before one; None where there is none. UsageError where it differs from where the bucket
        is."""
        known = home.place(self.name)
        named = _place(self.endpoint) if self.endpoint else None
        if known and known.behind and not (named and named.url == known.url):
            known = known.unfronted  # its front went with a replay that was killed
        if named is None:
            return known if known and known.named else None
        bucket = named.bucket or (known.bucket if known else fresh_bucket())
        wanted = replace(named, bucket=bucket)
        if known is None:
            return wanted
        if wanted == replace(known, named=known.named or bool(known.behind), behind=""):
            return known
        where = f"at {known.url}/{known.bucket}" if known.named else "in an emulator of its own"
        raise UsageError(
            f"The grid in {home.path} has its bucket {where}, not at {wanted.url}/{wanted.bucket}.",
            remedy=f"Leave out --endpoint and {VARIABLE}, or name another folder with --home.",
        )

    def open_emulator(self, home: Home) -> Emulator | None:
        """The grid's own emulator, None where an endpoint is named or none is needed."""
        if self.emulator is None or self.named_place(home):
            return None
        _only("emulator", self.emulator, "ministack")
        from batchlab.adapters.ministack import Emulator, install

        home.make()
        return Emulator(install(lambda _: None), home.of(self.name))

    def settle(self, home: Home, emulator: Emulator | None) -> None:
        """Write down where bucket and queues are, now that the endpoint answers, and make the
        bucket; BackendError."""
        place = self.named_place(home) or home.place(self.name)
        if emulator:
            known = home.place(self.name)
            place = Place(emulator.url, known.bucket if known else fresh_bucket(), named=False)
        if place is None:
            return
        from batchlab.adapters.aws import Endpoint, create_bucket

        create_bucket(Endpoint(place.url), place.bucket)
        home.of(self.name).mkdir(parents=True, exist_ok=True)
        home.write_place(self.name, place)


def _is_traced(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables ask for traces that we can send."""
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    is_off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or is_off or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if protocol in (None, "", "http/protobuf"):
        return True
    log.warning(
        "traces are sent by http/protobuf only, and OTEL_EXPORTER_OTLP_PROTOCOL says %s, so there "
        "are none",
        protocol,
    )
    return False


def patience() -> Patience:
    """For real backends: jitter that differs from process to process."""
    return Patience(random.Random())  # noqa: S311 - jitter, not a secret


def open_reporter(backend: Backend, home: Home, objects: Objects, pools: Sequence[Pool]) -> Writer:
    """Who writes the performance data of the grid's jobs; without their cost where no price book
    can be read."""
    from batchlab.costs import prices
    from batchlab.report.building import Setting
    from batchlab.report.writing import Writer

    try:
        book = prices.load(home.path)
    except UsageError as error:
        log.warning("job performance data has no cost: %s", error)
        book = None
    setting = Setting(backend.name, tuple(pools), backend.pace, book)
    scratch = home.scratch / "reports"
    shutil.rmtree(scratch, ignore_errors=True)  # of a manager that was killed while it wrote
    return Writer(objects, patience(), setting, scratch)


def names() -> list[str]:
    """The backends there are."""
    return sorted(p.parent.name for p in package_data.folder("backends").glob("*/backend.toml"))


def load(name: str, endpoint: str | None = None) -> Backend:
    """A backend's descriptor, with the endpoint that is named here or by BATCHLAB_ENDPOINT.

    UsageError for a name that is none, and for an endpoint where there is no use for one.
    """
    path = package_data.folder("backends") / name / "backend.toml"
    if name not in names():
        raise UsageError(
            f"There is no backend {name!r}.", remedy=f"There are {', '.join(names())}."
        )
    doc = tomllib.loads(path.read_text())
    emulator = doc.get("emulator")
    takes_endpoint = doc["objects"] == "s3" and doc.get("runs_in") != "aws"
    if endpoint and not takes_endpoint:
        raise UsageError(
            f"The backend {name} has no use for an endpoint.",
            remedy="Leave out --endpoint."
            + (" What stands in AWS's place AWS_ENDPOINT_URL names." if name == "aws" else ""),
        )
    if takes_endpoint and (endpoint := endpoint or os.environ.get(VARIABLE)):
        _place(endpoint)
    return Backend(
        name,
        doc["description"],
        doc["objects"],
        doc["queue"],
        doc["ledger"],
        doc["fleet"],
        ManagerSettings(**doc.get("manager", {})),
        WorkerSettings(**doc.get("worker", {})),
        tuple(_pool(p) for p in doc["pools"]),
        emulator,
        endpoint or None,
        doc.get("runs_in", "processes"),
        Image(**{kind: tuple(names) for kind, names in doc.get("image", {}).items()}),
        _usual(name, doc.get("usual", {})),
    )


def client_environment(backend: Backend, home: Home) -> dict[str, str]:
    """What lets any client of S3 and SQS find the grid's bucket and queues; nothing on files."""
    if backend.keeps_files:
        return {}
    if backend.is_deployed:  # with the caller's own credentials
        stack = backend.stack(home)
        return {
            "AWS_DEFAULT_REGION": stack.region,
            "BATCHLAB_BUCKET": stack.bucket,
            "BATCHLAB_QUEUES": stack.prefix,
        }
    from batchlab.adapters.aws import Endpoint

    place = backend.place(home)
    at = Endpoint(place.url)
    return {
        "AWS_ENDPOINT_URL": place.url,
        "AWS_ACCESS_KEY_ID": at.access_key,
        "AWS_SECRET_ACCESS_KEY": at.secret_key,
        "AWS_DEFAULT_REGION": at.region,
        "BATCHLAB_BUCKET": place.bucket,
        "BATCHLAB_QUEUES": f"{place.bucket}-",
    }


def with_pools(backend: Backend, pools: Sequence[Pool]) -> Backend:
    """The backend with the user's own pools in place of its default ones."""
    return replace(backend, pools=tuple(pools)) if pools else backend


def _pool(doc: dict[str, Any]) -> Pool:
    if doc.get("max_size") == "cpus":
        doc = {**doc, "max_size": max(2, _cores())}
    return Pool(**doc)


def _usual(name: str, doc: dict[str, Any]) -> Calibration:
    if "call_s" in doc:
        least_s, most_s = doc["call_s"]
        doc = {**doc, "call_s": (least_s, most_s)}
    if doc.get("cores") == "cpus":
        doc = {**doc, "cores": _cores()}
    return Calibration(name, **doc)


def _cores() -> int:
    """How many this process may run on, where the system says that: in a container, or under
    taskset, not all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _place(endpoint: str) -> Place:
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None:
        # A name and password in it are for nobody's eyes.
        shown = re.sub(r"//[^/@]*@", "//…@", endpoint)
        raise UsageError(
            f"The endpoint {shown!r} is not a URL with a bucket's name as its path.",
            remedy="Write for example http://127.0.0.1:4566 or http://127.0.0.1:4566/my-bucket, "
            "with 3 to 28 small letters, digits and hyphens.",
        )
    return Place(found["url"], found["bucket"] or "", named=True)


def fresh_bucket() -> str:
    return f"batchlab-{secrets.token_hex(5)}"


def open_asg_launcher(
    settings: AsgSettings,
    templates: TemplateFile,
    clock: Clock,
    signals: Callable[[str], Signals],
) -> ProcessLauncher | ContainerLauncher:
    """The launcher that `asg serve` is told to use, which tells instances their `signals` where it
    can; UsageError where there is none of that name."""
    if settings.launcher == "process":
        from batchlab.adapters.process import ProcessLauncher

        return ProcessLauncher(settings.state, templates.argv, clock, dict(os.environ))
    if settings.launcher != "docker":
        raise UsageError(
            f"There is no launcher {settings.launcher!r}.",
            remedy="Say --launcher process or --launcher docker.",
        )
    from batchlab import catalogue
    from batchlab.adapters.docker import ContainerLauncher
    from batchlab.adapters.docker_container import Template

    def template(pool: Pool) -> Template:
        version = templates.launched(pool)
        return Template(
            version.image,
            tuple(templates.argv(pool, "{instance}")),
            version.network,
            type=version.type,
            user=version.user,
            system=version.system,
        )

    return ContainerLauncher(
        template,
        catalogue.load(),
        clock,
        settings.state,
        grid=settings.grid.removeprefix("batchlab-"),
        labels={**settings.labels, "batchlab.grid": settings.grid},
        scale=settings.scale,
        signals=signals,
    )


def _only(port: str, named: str, known: str) -> None:
    if named != known:
        raise UsageError(
            f"This backend's {port} adapter {named!r} does not run in a process of its own.",
            remedy="`batchlab run FILE --backend sim` runs a job in it.",
        )
