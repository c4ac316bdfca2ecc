"""Where the parts of a grid are: its containers, its stack on AWS, its bucket and its queues.

Invariant: read from the home and written there once, by who has made them; what is not there yet
is Unreachable, with the command that makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.adapters.bucket import Bucket
from batchlab.adapters.local import access_keys
from batchlab.core import optional_dependencies
from batchlab.core.errors import Unreachable, UsageError
from batchlab.core.model import Pool
from batchlab.runtime.aws import deployment as stacks
from batchlab.runtime.compose import deployment as deployment
from batchlab.runtime.descriptor import VARIABLE, Descriptor, fresh_bucket, place_of
from batchlab.runtime.home import Home, Place

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local.ministack import Emulator
    from batchlab.runtime.aws.deployment import AwsDeployment
    from batchlab.runtime.compose.deployment import Deployment


@dataclass(frozen=True, slots=True)
class Services:
    """The S3 and SQS of a grid."""

    endpoint: Endpoint
    bucket: str
    queue_prefix: str


@dataclass(frozen=True, slots=True)
class Placed(Descriptor):
    """A descriptor that finds its grid's parts in a home."""

    def check_installed(self, *modules: str) -> None:
        """UsageError where the extra that this backend needs is not installed, or of it not
        `modules`, where no more is needed."""
        if self.extra:
            optional_dependencies.need(self.extra, f"The backend {self.name}", *modules)

    def deployment(self, home: Home) -> Deployment:
        """Where the containers are; Unreachable where there are none."""
        if at := deployment.read(home):
            return at
        raise Unreachable(
            f"No grid on {self.name} is up in {home.path}.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def restarts_manager(self, home: Home) -> bool:
        """Whether a manager that has ended is started again by somebody else, within seconds."""
        return self.capabilities.container_manager and deployment.read(home) is not None

    def manager_log(self, home: Home) -> str:
        """Where the manager's log is, for a person."""
        if self.capabilities.container_manager and (at := deployment.read(home)):
            return f"what `docker logs {at.project}-manager-1` shows"
        return str(home.manager_log)

    def check_python(self, home: Home) -> None:
        """UsageError unless the instances run on this process's Python: functions travel as
        bytecode, which no other version understands."""
        there, remedy = "", ""
        if self.capabilities.container_manager:
            at = deployment.read(home)
            there = at.python if at else ""
            remedy = (
                "Name an image with Python {here} by BATCHLAB_BASE_IMAGE before the grid comes up"
            )
        elif self.capabilities.stack:
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
        return self.stack(home).pools if self.capabilities.stack else self.pools

    def api_token(self, home: Home) -> str:
        """The API's bearer token. That of a stack is in Secrets Manager; it is kept in the home,
        for whoever talks to the manager from there."""
        if self.capabilities.stack:
            from batchlab.runtime.aws.session_manager import secret_text

            at = self.stack(home)
            home.keep_token(secret_text(at.region, at.token_secret))
        return home.token()

    # --- The endpoint ----------------------------------------------------------------------------

    def place(self, home: Home) -> Place:
        """Where bucket and queues are; Unreachable where the grid has never been up."""
        if place := home.place(self.name):
            return place
        if self.endpoint and (named := place_of(self.endpoint, self.bucket_scheme)).bucket:
            return named  # an instance knows them from its environment alone
        # Of one in containers the bucket went with it.
        been = "is" if self.capabilities.container_manager else "has been"
        raise Unreachable(
            f"No grid on {self.name} {been} up in {home.path}, so there is no bucket.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def endpoint_at(self, home: Home, place: Place) -> Endpoint:
        """The endpoint of the place, with the keys of the grid's own emulator if it is that."""
        from batchlab.adapters.aws.endpoint import Endpoint

        own = None
        if self.emulator and not place.named:
            own = access_keys.read(home.of(self.name) / access_keys.FILE)
        if own is None:
            return Endpoint(place.url)
        return Endpoint(place.url, access_key=own.access_key, secret_key=own.secret_key)

    def services(self, home: Home) -> Services:
        """Return where S3 and SQS are; Unreachable if the grid has never been up."""
        from batchlab.adapters.aws.endpoint import Endpoint

        if self.capabilities.stack:
            stack = self.stack(home)
            return Services(Endpoint(region=stack.region), stack.bucket, stack.prefix)
        place = self.place(home)
        return Services(self.endpoint_at(home, place), place.bucket, f"{place.bucket}-")

    def bucket(self, home: Home) -> str:
        """What a job file calls the grid's bucket by in `s3://BUCKET/…`: its name, on files the
        backend's. Unreachable where the grid has never been up, and has none."""
        if self.capabilities.local_bucket:
            return self.name
        return self.place(home).bucket if self.bucket_scheme else self.services(home).bucket

    def folder(self, home: Home) -> Path:
        """Return the folder of the backend's own files: the home if the bucket is in it."""
        return home.path if self.capabilities.local_bucket else home.of(self.name)

    def provide(self, home: Home, say: Callable[[str], None]) -> None:
        """Do what takes long or may be refused before a manager is started, where the user sees
        it: install the emulator (`say` hears of it), or look whether the named endpoint answers.
        UsageError, BackendError."""
        named = self.named_place(home)
        if self.bucket_scheme:
            self._check_bucket(named)
        elif named:
            from batchlab.adapters.aws.endpoint import check

            check(self.endpoint_at(home, named))
        elif self.emulator:
            from batchlab.adapters.local.ministack import provide

            provide(say)

    def _check_bucket(self, named: Place | None) -> None:
        if named is None:
            raise UsageError(
                f"The backend {self.name} needs a bucket.",
                remedy=f"Name it with --endpoint {self.bucket_scheme}://BUCKET or {VARIABLE}.",
            )
        import_module(self.objects).check(Bucket(named.bucket))

    def named_place(self, home: Home) -> Place | None:
        """The endpoint that the user has named, now or when this home was first used, or a front
        before one; None where there is none. UsageError where it differs from where the bucket
        is."""
        known = home.place(self.name)
        named = place_of(self.endpoint, self.bucket_scheme) if self.endpoint else None
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
        where = f"at {known.address}" if known.named else "in an emulator of its own"
        raise UsageError(
            f"The grid in {home.path} has its bucket {where}, not at {wanted.address}.",
            remedy=f"Leave out --endpoint and {VARIABLE}, or name another folder with --home.",
        )

    def settle(self, home: Home, emulator: Emulator | None) -> None:
        """Write down where bucket and queues are, now that the endpoint answers, and make the
        bucket; BackendError."""
        place = self.named_place(home) or home.place(self.name)
        if emulator:
            known = home.place(self.name)
            place = Place(emulator.url, known.bucket if known else fresh_bucket(), named=False)
        if place is None:
            return
        if not self.bucket_scheme:
            from batchlab.adapters.aws.endpoint import create_bucket

            create_bucket(self.endpoint_at(home, place), place.bucket)
        if not self.capabilities.container_manager:  # `grid up` wrote it; the folder is read-only
            home.of(self.name).mkdir(parents=True, exist_ok=True)
            home.write_place(self.name, place)


def client_environment(backend: Placed, home: Home) -> dict[str, str]:
    """What lets any client of S3 and SQS find the grid's bucket and queues; nothing on files."""
    if backend.capabilities.local_bucket:
        return {}
    if backend.bucket_scheme:
        return {"BATCHLAB_BUCKET": backend.bucket(home)}
    there = backend.services(home)
    at = there.endpoint
    found = {
        "AWS_DEFAULT_REGION": at.region,
        "BATCHLAB_BUCKET": there.bucket,
        "BATCHLAB_QUEUES": there.queue_prefix,
    }
    if at.url is None:  # AWS's own, with the caller's own credentials
        return found
    return {
        "AWS_ENDPOINT_URL": at.url,
        "AWS_ACCESS_KEY_ID": at.access_key,
        "AWS_SECRET_ACCESS_KEY": at.secret_key,
        **found,
    }
