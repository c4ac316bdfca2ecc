"""Locations of a grid's parts: its containers, its stack on AWS, its bucket, and its queues.

Invariant: the program that creates a part records its location in the home, once. A part without a
record is Unreachable, and the error names the command that creates it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.adapters.limits import Bucket
from batchlab.adapters.local import access_keys
from batchlab.core import installation
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.model import Pool
from batchlab.runtime import aws_deployment, compose_deployment
from batchlab.runtime.descriptor import VARIABLE, Descriptor, fresh_bucket, place_of
from batchlab.runtime.home import Home, Place

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local.ministack import Emulator
    from batchlab.adapters.obstore_objects import ObstoreObjects
    from batchlab.runtime.aws_deployment import AwsDeployment
    from batchlab.runtime.compose_deployment import Deployment


@dataclass(frozen=True, slots=True)
class Services:
    """Endpoint and names of a grid's S3 and SQS."""

    endpoint: Endpoint
    bucket: str
    queue_prefix: str


@dataclass(frozen=True, slots=True)
class Placed(Descriptor):
    """Descriptor that finds its grid's parts in a home."""

    def check_installed(self, *modules: str) -> None:
        """Raise UsageError unless the extra that this backend needs is installed.

        If the caller names `modules`, only these modules of the extra must be installed.
        """
        if self.extra:
            installation.need(self.extra, f"The backend {self.name}", *modules)

    def deployment(self, home: Home) -> Deployment:
        """Return the location of the containers. Raise Unreachable if there are none."""
        if at := compose_deployment.read(home):
            return at
        raise Unreachable(
            f"No grid on {self.name} is up in {home.path}.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def restarts_manager(self, home: Home) -> bool:
        """Return whether Docker restarts a manager that has ended."""
        return self.capabilities.container_manager and compose_deployment.read(home) is not None

    def manager_log(self, home: Home) -> str:
        """Return the location of the manager's log, as text for a user."""
        if self.capabilities.container_manager and (at := compose_deployment.read(home)):
            return f"what `docker logs {at.project}-manager-1` shows"
        return str(home.manager_log)

    def check_python(self, home: Home) -> None:
        """Raise UsageError unless the instances run this process's version of Python.

        Functions travel as bytecode, which other versions cannot run.
        """
        there, remedy = "", ""
        if self.capabilities.container_manager:
            at = compose_deployment.read(home)
            there = at.python if at else ""
            remedy = "Name an image with Python {here} by BATCHLAB_BASE_IMAGE before the grid comes up"
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
        """Return the locations of the stack's parts.

        Raise Unreachable if this home records no stack.
        """
        if at := aws_deployment.read(home):
            return at
        raise Unreachable(
            f"No stack is known in {home.path}.",
            remedy="`batchlab deploy apply` makes one, `batchlab deploy status --stack NAME` finds one that is there.",
        )

    def pools_in(self, home: Home) -> tuple[Pool, ...]:
        """Return the pools of the grid. With a stack, these are the stack's pools."""
        return self.stack(home).pools if self.capabilities.stack else self.pools

    def api_token(self, home: Home) -> str:
        """Return the API's bearer token.

        The token of a stack is in Secrets Manager. A copy is stored in the home for clients on this
        machine.
        """
        if self.capabilities.stack:
            from batchlab.runtime.aws_session import secret_text

            at = self.stack(home)
            home.keep_token(secret_text(at.region, at.token_secret))
        return home.token()

    # --- The endpoint ----------------------------------------------------------------------------

    def place(self, home: Home) -> Place:
        """Return the location of bucket and queues.

        Raise Unreachable if the grid has never been up.
        """
        if place := home.place(self.name):
            return place
        if self.endpoint and (named := place_of(self.endpoint, self.bucket_scheme)).bucket:
            return named  # An instance does not have a record. Its environment names the endpoint.
        # A grid in containers loses its bucket when it goes down.
        been = "is" if self.capabilities.container_manager else "has been"
        raise Unreachable(
            f"No grid on {self.name} {been} up in {home.path}, so there is no bucket.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def endpoint_at(self, home: Home, place: Place) -> Endpoint:
        """Return the endpoint of the place. The grid's own emulator has its own access keys."""
        from batchlab.adapters.aws.endpoint import Endpoint

        own = None
        if self.emulator and not place.named:
            own = access_keys.read(home.of(self.name) / access_keys.FILE)
        if own is None:
            return Endpoint(place.url)
        return Endpoint(place.url, access_key=own.access_key, secret_key=own.secret_key)

    def services(self, home: Home) -> Services:
        """Return the location of S3 and SQS. Raise Unreachable if the grid has never been up."""
        from batchlab.adapters.aws.endpoint import Endpoint

        if self.capabilities.stack:
            stack = self.stack(home)
            return Services(Endpoint(region=stack.region), stack.bucket, stack.prefix)
        place = self.place(home)
        return Services(self.endpoint_at(home, place), place.bucket, f"{place.bucket}-")

    def bucket(self, home: Home) -> str:
        """Return the name of the grid's bucket in a job file's `s3://BUCKET/…`.

        A local bucket has the name of the backend. Raise Unreachable if the grid has never been up.
        """
        if self.capabilities.local_bucket:
            return self.name
        return self.place(home).bucket if self.bucket_scheme else self.services(home).bucket

    def folder(self, home: Home) -> Path:
        """Return the folder of the backend's own files: the home if the bucket is in it."""
        return home.path if self.capabilities.local_bucket else home.of(self.name)

    def provide(self, home: Home, say: Callable[[str], None]) -> None:
        """Install the emulator, or check the named endpoint or bucket.

        A client calls this before it starts a manager, so that the user sees the errors. `say` is
        called with messages about the installation. Raise UsageError or BackendError if something
        is missing.
        """
        place = self.named_place(home)
        if self.bucket_scheme:
            self._check_bucket(place)
        elif place:
            from batchlab.adapters.aws.endpoint import check

            check(self.endpoint_at(home, place))
        elif self.emulator:
            from batchlab.adapters.local.ministack import provide

            provide(say)

    def _check_bucket(self, named: Place | None) -> None:
        if named is None:
            raise UsageError(
                f"The backend {self.name} needs a bucket.",
                remedy=f"Name it with --endpoint {self.bucket_scheme}://BUCKET or {VARIABLE}.",
            )
        objects: ObstoreObjects = import_module(self.objects).open_objects(Bucket(named.bucket))
        try:
            objects.check()
        except BackendError as error:
            raise BackendError(
                f"The bucket {named.address} cannot be listed: {error.message}", remedy=objects.remedy
            ) from error

    def named_place(self, home: Home) -> Place | None:
        """Return the endpoint that the user has named, now or when this home was first used.

        During a replay, the result is the proxy in front of that endpoint. The result is None if
        the user did not name an endpoint. Raise UsageError if the bucket of this home is at another
        endpoint.
        """
        known = home.place(self.name)
        place = place_of(self.endpoint, self.bucket_scheme) if self.endpoint else None
        if known and known.behind and not (place and place.url == known.url):
            known = known.unfronted  # The proxy ended with a replay that was killed.
        if place is None:
            return known if known and known.named else None
        bucket = place.bucket or (known.bucket if known else fresh_bucket())
        wanted = replace(place, bucket=bucket)
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
        """Create the bucket and record the location of bucket and queues.

        The manager calls this as soon as the endpoint responds. Raise BackendError if the bucket
        cannot be created.
        """
        place = self.named_place(home) or home.place(self.name)
        if emulator:
            known = home.place(self.name)
            place = Place(emulator.url, known.bucket if known else fresh_bucket(), named=False)
        if place is None:
            return
        if not self.bucket_scheme:
            from batchlab.adapters.aws.endpoint import create_bucket

            create_bucket(self.endpoint_at(home, place), place.bucket)
        # `grid up` wrote it; the folder is read-only here
        if not self.capabilities.container_manager:
            home.of(self.name).mkdir(parents=True, exist_ok=True)
            home.write_place(self.name, place)


def client_environment(backend: Placed, home: Home) -> dict[str, str]:
    """Return the environment variables with which other clients find the grid's bucket and queues.

    A local bucket does not need any.
    """
    if backend.capabilities.local_bucket:
        return {}
    if backend.bucket_scheme:
        return {"BATCHLAB_BUCKET": backend.bucket(home)}
    services = backend.services(home)
    at = services.endpoint
    found = {
        "AWS_DEFAULT_REGION": at.region,
        "BATCHLAB_BUCKET": services.bucket,
        "BATCHLAB_QUEUES": services.queue_prefix,
    }
    if at.url is None:  # On AWS itself, clients use their own credentials.
        return found
    return {
        "AWS_ENDPOINT_URL": at.url,
        "AWS_ACCESS_KEY_ID": at.access_key,
        "AWS_SECRET_ACCESS_KEY": at.secret_key,
        **found,
    }
