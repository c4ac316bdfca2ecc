"""Locations of a grid's containers, stack on AWS, bucket, and queues.

Invariant: the program that creates a part of a grid records the location of the part once, in the home. The lookup of a
part without a record raises Unreachable with the command that creates the part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.adapters.local import state_files
from batchlab.core import installation
from batchlab.core.errors import BackendError, Unreachable, UsageError
from batchlab.core.model import Pool
from batchlab.runtime import aws_deployment, compose_deployment
from batchlab.runtime.descriptor import VARIABLE, Descriptor, new_bucket_name, parse_endpoint
from batchlab.runtime.home import Home, Place

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.local.ministack import Emulator
    from batchlab.adapters.obstore_objects import ObstoreObjects
    from batchlab.runtime.aws_deployment import AwsDeployment
    from batchlab.runtime.compose_deployment import Deployment


@dataclass(frozen=True, slots=True)
class Services:
    """Endpoint of S3 and SQS, and the names of a grid's bucket and queues."""

    endpoint: Endpoint
    bucket: str
    queue_prefix: str


@dataclass(frozen=True, slots=True)
class BackendLocations(Descriptor):
    """Descriptor of a backend, with methods that find the parts of a grid in a home."""

    def check_installed(self, *modules: str) -> None:
        """Raise UsageError unless the extra that the backend needs is installed.

        If `modules` are given, only the modules in `modules` must be installed.
        """
        if self.extra:
            installation.need(self.extra, f"The backend {self.name}", *modules)

    def deployment(self, home: Home) -> Deployment:
        """Return the locations of the grid's containers. Raise Unreachable if the home does not record containers."""
        if at := compose_deployment.read(home):
            return at
        raise Unreachable(
            f"No grid on {self.name} is up in {home.path}.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def restarts_manager(self, home: Home) -> bool:
        """Return whether Docker restarts the grid's manager after the manager has ended."""
        return self.capabilities.container_manager and compose_deployment.read(home) is not None

    def manager_log(self, home: Home) -> str:
        """Return the location of the manager's log as text for a user."""
        if self.capabilities.container_manager and (at := compose_deployment.read(home)):
            return f"the output of `docker logs {at.project}-manager-1`"
        return str(home.manager_log)

    def check_python(self, home: Home) -> None:
        """Raise UsageError unless the instances run the same Python version as this process.

        Clients send functions as bytecode, which other versions of Python cannot run.
        """
        own = f"{sys.version_info.major}.{sys.version_info.minor}"
        grids, remedy = "", ""
        if self.capabilities.container_manager:
            at = compose_deployment.read(home)
            grids = at.python if at else ""
            remedy = f"Set BATCHLAB_BASE_IMAGE to an image with Python {own} before you start the grid"
        elif self.capabilities.stack:
            grids = self.stack(home).python
            remedy = f"Deploy a release for Python {own} with `batchlab deploy apply`"
        if grids and grids != own:
            raise UsageError(
                f"The grid's instances run on Python {grids}, but this process runs on Python {own}, so it cannot send "
                "functions to them.",
                remedy=f"{remedy}, or describe the job in a file.",
            )

    # --- The stack on AWS ------------------------------------------------------------------------

    def stack(self, home: Home) -> AwsDeployment:
        """Return the locations of the stack's parts. Raise Unreachable if the home does not record a stack."""
        if at := aws_deployment.read(home):
            return at
        raise Unreachable(
            f"No stack is recorded in {home.path}.",
            remedy="Create a stack with `batchlab deploy apply`, or find an existing one with "
            "`batchlab deploy status --stack NAME`.",
        )

    def pools_in(self, home: Home) -> tuple[Pool, ...]:
        """Return the pools of the grid. The pools of a grid with a stack are the pools of the stack."""
        return self.stack(home).pools if self.capabilities.stack else self.pools

    def api_token(self, home: Home) -> str:
        """Return the API's bearer token.

        The API token of a stack is in Secrets Manager. A copy of the token is stored in the home for clients on this
        machine.
        """
        if self.capabilities.stack:
            from batchlab.runtime.stack_connections import secret_text

            at = self.stack(home)
            home.store_token(secret_text(at.region, at.token_secret))
        return home.token()

    # --- The endpoint ----------------------------------------------------------------------------

    def place(self, home: Home) -> Place:
        """Return the location of the bucket and the queues. Raise Unreachable if the grid has never been up."""
        if place := home.place(self.name):
            return place
        if self.endpoint and (named := parse_endpoint(self.endpoint, self.bucket_scheme)).bucket:
            return named  # The environment of an instance names the endpoint, which its home does not record.
        # A grid in containers loses its bucket when the grid goes down.
        verb = "is" if self.capabilities.container_manager else "has been"
        raise Unreachable(
            f"No grid on {self.name} {verb} up in {home.path}, so its bucket does not exist.",
            remedy=f"Start one with `batchlab grid up --backend {self.name}`.",
        )

    def endpoint_at(self, home: Home, place: Place) -> Endpoint:
        """Return the endpoint of a location with the endpoint's access keys. The grid's own emulator has its own access
        keys.
        """
        from batchlab.adapters.aws.endpoint import Endpoint

        own = None
        if self.emulator and not place.named:
            own = state_files.read_keys(home.backend_folder(self.name) / state_files.KEYS_FILE)
        if own is None:
            return Endpoint(place.url)
        return Endpoint(place.url, access_key=own.access_key, secret_key=own.secret_key)

    def services(self, home: Home) -> Services:
        """Return the endpoint of S3 and SQS, and the names of the grid's bucket and queues. Raise Unreachable if the
        grid has never been up.
        """
        from batchlab.adapters.aws.endpoint import Endpoint

        if self.capabilities.stack:
            stack = self.stack(home)
            return Services(Endpoint(region=stack.region), stack.bucket, stack.prefix)
        place = self.place(home)
        return Services(self.endpoint_at(home, place), place.bucket, f"{place.bucket}-")

    def bucket(self, home: Home) -> str:
        """Return the name of the grid's own bucket, as a job file writes the name in `s3://BUCKET/…`.

        The name of a bucket in a local folder is the name of the backend. Raise Unreachable if the grid has never been
        up.
        """
        if self.capabilities.local_bucket:
            return self.name
        return self.place(home).bucket if self.bucket_scheme else self.services(home).bucket

    def folder(self, home: Home) -> Path:
        """Return the folder for files of the backend. If the bucket is a local folder, the folder for files is the home
        itself.
        """
        return home.path if self.capabilities.local_bucket else home.backend_folder(self.name)

    def provide(self, home: Home, say: Callable[[str], None]) -> None:
        """Install the emulator, or check the endpoint or the bucket that the user named.

        A client calls `provide` before it starts a manager, so that the user sees an error. `say` is called with
        messages about the installation. Raise UsageError or BackendError if the installation or the check fails.
        """
        place = self.find_place(home)
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
        from batchlab.adapters.limits import Bucket

        objects: ObstoreObjects = import_module(self.objects).open_objects(Bucket(named.bucket))
        try:
            objects.check()
        except BackendError as error:
            raise BackendError(
                f"The bucket {named.address} cannot be listed: {error.message}", remedy=objects.remedy
            ) from error

    def find_place(self, home: Home) -> Place | None:
        """Return the endpoint that the user names now, or that the user named at the first use of the home.

        During a replay, the result is the address of the proxy for the named endpoint. The result is None if the user
        never named an endpoint. Raise UsageError if the bucket of the home is at another endpoint.
        """
        recorded = home.place(self.name)
        place = parse_endpoint(self.endpoint, self.bucket_scheme) if self.endpoint else None
        if recorded and recorded.behind and not (place and place.url == recorded.url):
            recorded = recorded.without_proxy  # The recorded proxy no longer runs, because its replay was killed.
        if place is None:
            return recorded if recorded and recorded.named else None
        wanted = replace(place, bucket=place.bucket or (recorded.bucket if recorded else new_bucket_name()))
        if recorded is None:
            return wanted
        if wanted == replace(recorded, named=recorded.named or bool(recorded.behind), behind=""):
            return recorded
        where = f"at {recorded.address}" if recorded.named else "in an emulator of its own"
        raise UsageError(
            f"The grid in {home.path} has its bucket {where}, not at {wanted.address}.",
            remedy=f"Leave out --endpoint and {VARIABLE}, or name another folder with --home.",
        )

    def settle(self, home: Home, emulator: Emulator | None) -> None:
        """Create the bucket, and record the location of the bucket and the queues.

        The manager calls `settle` as soon as the endpoint responds. Raise BackendError if the bucket cannot be created.
        """
        place = self.find_place(home) or home.place(self.name)
        if emulator:
            recorded = home.place(self.name)
            place = Place(emulator.url, recorded.bucket if recorded else new_bucket_name(), named=False)
        if place is None:
            return
        if not self.bucket_scheme:
            from batchlab.adapters.aws.endpoint import create_bucket

            create_bucket(self.endpoint_at(home, place), place.bucket)
        # `grid up` has recorded the location of a grid in containers. The folder of a grid in containers is read-only
        # for its manager.
        if not self.capabilities.container_manager:
            home.backend_folder(self.name).mkdir(parents=True, exist_ok=True)
            home.write_place(self.name, place)


def client_environment(backend: BackendLocations, home: Home) -> dict[str, str]:
    """Return the environment variables with which other clients find the grid's bucket and queues.

    Clients of a bucket in a local folder do not need environment variables.
    """
    if backend.capabilities.local_bucket:
        return {}
    if backend.bucket_scheme:
        return {"BATCHLAB_BUCKET": backend.bucket(home)}
    services = backend.services(home)
    at = services.endpoint
    variables = {
        "AWS_DEFAULT_REGION": at.region,
        "BATCHLAB_BUCKET": services.bucket,
        "BATCHLAB_QUEUES": services.queue_prefix,
    }
    if at.url is None:  # On AWS, clients use their own credentials.
        return variables
    keys = {"AWS_ACCESS_KEY_ID": at.access_key, "AWS_SECRET_ACCESS_KEY": at.secret_key}
    return {"AWS_ENDPOINT_URL": at.url, **keys, **variables}
