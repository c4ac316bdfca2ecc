"""Endpoint that a run tests, with the run's clients and the resources that the run creates at the endpoint.

Invariants: the name of every resource contains the run's name, and every resource is recorded before its creation.
`Target.close` removes all recorded resources, even after a failed run. After the start of `Target.close`, a check
cannot create resources. The boto3 clients do not retry calls, so a check gets the first response.

`Target.close` uses new clients, because the run's clients refuse all calls after the end of the run. `Target.close`
removes only resources of the run, and stops as soon as the endpoint does not respond.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from batchlab.adapters.aws import endpoint as aws
from batchlab.adapters.aws.objects import open_s3
from batchlab.conform.check import Untried, answer
from batchlab.core.errors import BackendError, Unreachable, UsageError

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from mypy_boto3_autoscaling import AutoScalingClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient

    from batchlab.adapters.aws.endpoint import Endpoint
    from batchlab.adapters.obstore_objects import ObstoreObjects
    from batchlab.core.ports import Clock

MAX_REQUESTS = 8
"""Maximum number of concurrent requests during the removal of a run's resources."""

C = TypeVar("C", bound="BaseClient")

MAX_CONNECTIONS = 64
_MISSING_CODES = ("NonExistentQueue", "QueueDoesNotExist", "NoSuchBucket", "404")


class Cleaner:
    """Remover of the resources of a run. Each method returns a message for each resource that could not be removed."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._silent = ""

    def queues(self, urls: Mapping[str, str]) -> list[str]:
        """Remove the queues in `urls`, a mapping of queue names to URLs.

        If the URL of a queue is "", ask the endpoint for the URL.
        """
        if not urls:
            return []
        sqs = aws.client(self._endpoint, "sqs", connections=MAX_REQUESTS)

        def delete(name: str) -> None:
            sqs.delete_queue(QueueUrl=urls[name] or sqs.get_queue_url(QueueName=name)["QueueUrl"])

        return self._remove("queue", urls, delete)

    def groups(self, names: Sequence[str]) -> list[str]:
        """Remove the Auto Scaling groups whose names are in `names`, and the instances of the groups."""
        if not names:
            return []
        asg = aws.client(self._endpoint, "autoscaling", connections=MAX_REQUESTS)

        def delete(name: str) -> None:
            try:
                asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
            except (ClientError, ResponseParserError):
                # The error code does not reveal whether the group exists, so ask the endpoint for the group's
                # description.
                if asg.describe_auto_scaling_groups(AutoScalingGroupNames=[name])["AutoScalingGroups"]:
                    raise

        return self._remove("Auto Scaling group", names, delete)

    def template(self, name: str) -> list[str]:
        """Remove the launch template with the name `name`."""
        ec2 = aws.client(self._endpoint, "ec2", connections=1)

        def delete(name: str) -> None:
            ec2.delete_launch_template(LaunchTemplateName=name)

        return self._remove("launch template", [name], delete)

    def objects(self, bucket: str, prefix: str, *, with_bucket: bool) -> list[str]:
        """Remove the objects and multipart uploads below `prefix`. If `with_bucket` is true, also remove the bucket."""
        s3 = aws.client(self._endpoint, "s3", connections=1)

        def remove(_name: str) -> str | None:
            for upload in s3.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
                if upload["Key"].startswith(prefix):
                    s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            # A paginator could loop forever if the endpoint's listings or deletes are incorrect, so each call lists the
            # first page.
            previous: list[str] = []
            while contents := s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents"):
                keys = [entry["Key"] for entry in contents]
                if keys == previous:
                    return "its objects cannot be deleted"
                s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})
                previous = keys
            if with_bucket:
                s3.delete_bucket(Bucket=bucket)
            return None

        if with_bucket:
            return self._remove("bucket", [bucket], remove)
        return self._remove("objects below", [f"{bucket}/{prefix}"], remove)

    def _remove(self, kind: str, names: Collection[str], remove: Callable[[str], str | None]) -> list[str]:
        """Remove resources of one kind concurrently, and return a message for each failure.

        The function `remove` returns the reason of a failure as text, or None, or raises an error.
        """
        with ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="conform-close") as threads:
            reasons = threads.map(lambda name: self._try(partial(remove, name)), names)
            return [f"{kind} {name}: {reason}" for name, reason in zip(names, reasons, strict=True) if reason]

    def _try(self, remove: Callable[[], str | None]) -> str:
        """Call `remove`, and return the reason of a failure, or "" if the resource was removed or did not exist."""
        if self._silent:
            return self._silent
        try:
            return remove() or ""
        except ClientError as error:
            code = aws.code_of(error)
            return "" if code in _MISSING_CODES else f"{error.operation_name} returns {code}"
        except ResponseParserError:
            return "the endpoint's response is not in AWS's format"
        except BotoCoreError as error:
            self._silent = f"the endpoint does not respond ({type(error).__name__})"
            return self._silent


def endpoint(url: str | None, region: str | None) -> Endpoint:
    """Return the endpoint at `url`, or AWS itself if `url` is None. Raise UsageError for an invalid URL.

    The access keys and the region of an endpoint come from environment variables, and never from a profile. Emulators
    accept the access keys that are used by default.
    """
    if region and not re.fullmatch("[a-z0-9-]+", region):
        raise UsageError(f"{region} is not the name of a region.", remedy="An example is eu-west-1.")
    if url is None:
        return _in_aws(region)
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise UsageError(
            f"{url} is not the address of an endpoint.",
            remedy="An address has http:// or https://, a host, and an optional port. An example is http://127.0.0.1:4566.",
        )
    if (parts.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws")):
        raise UsageError(f"{url} is AWS itself.", remedy="Use --aws to test AWS.")
    env = os.environ.get
    place = region or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or "us-east-1"
    keys = (env("AWS_ACCESS_KEY_ID") or "", env("AWS_SECRET_ACCESS_KEY") or "")
    return aws.Endpoint(url.rstrip("/"), place, *(keys if all(keys) else ()))


def _in_aws(region: str | None) -> Endpoint:
    session = boto3.Session(region_name=region)
    if session.get_credentials() is None:
        raise UsageError(
            "AWS credentials are missing.", remedy="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return aws.Endpoint(None, session.region_name or "us-east-1")


class Target:
    """The services S3, SQS, and Auto Scaling at one endpoint, for the checks of a run.

    `run` is the short, unique name of the run. If `bucket` names an existing bucket, the run uses and keeps the bucket.
    If `template` names an existing launch template, the run uses and keeps the launch template. If `bucket` or
    `template` is "", the run creates a temporary bucket or launch template, and removes the temporary resource at the
    end of the run.
    """

    def __init__(self, endpoint: Endpoint, *, run: str, clock: Clock, bucket: str = "", template: str = "") -> None:
        self.endpoint = endpoint
        self.run = run
        self.clock = clock
        self.bucket = bucket or run
        self.lag_s = 60.0 if endpoint.url is None else 0.0
        """Time in seconds after which a purge or a new attribute of a queue takes effect for all calls on AWS."""
        self.settles_s = self.lag_s + 10.0
        """Time in seconds for which the message counts of a queue may be wrong."""
        self.arrives_s = 12.0
        """Time limit in seconds for the arrival of a visible message, even on a busy machine."""
        self.appears_s = 15.0
        """Time limit in seconds for the start or the end of an instance, even on a busy machine."""
        self.template = template or run
        self.zone = f"{endpoint.region}a"
        self.s3: S3Client
        self.other_s3: S3Client
        """Second S3 client with connections of its own, which reads the objects that the client `s3` has written."""
        self.sqs: SQSClient
        self.asg: AutoScalingClient
        self._objects: ObstoreObjects
        self._keep_bucket = bool(bucket)
        self._changed = threading.Condition()
        self._queues: dict[str, str] = {}
        """URLs of the queues by queue name. The URL is "" until CreateQueue has returned the URL."""
        self._creating = 0
        self._has_new_bucket = False
        self._keep_template = bool(template)
        self._has_new_template = False
        self._groups: set[str] = set()
        self._closed = False

    @property
    def place(self) -> str:
        return self.endpoint.url or f"AWS in {self.endpoint.region}"

    @property
    def objects(self) -> ObstoreObjects:
        self._check_open()
        return self._objects

    def _check_open(self, **_: object) -> None:
        if self._closed:
            raise Untried("the run has ended")

    def open(self, services: Collection[str]) -> None:
        """Check that the services respond, and create the bucket or launch template of the run.

        Raise BackendError if a service does not respond.
        """
        if "s3" in services:
            self.s3, self.other_s3 = (
                self._own(aws.client(self.endpoint, "s3", connections=MAX_CONNECTIONS)) for _ in range(2)
            )
            self._objects = open_s3(self.endpoint, self.bucket)
            with self._responding("S3"):
                self._open_bucket()
        if "sqs" in services:
            self.sqs = self._own(aws.client(self.endpoint, "sqs", connections=MAX_CONNECTIONS))
            with self._responding("SQS"):
                # Send a read request before the first creation. If the endpoint does not respond, the run has not
                # created a resource yet.
                answer("GetQueueUrl", lambda: self.sqs.get_queue_url(QueueName=self.run))
                self.create_queue(self.run, {})
        if "autoscaling" in services:
            self.asg = self._own(aws.client(self.endpoint, "autoscaling", connections=MAX_CONNECTIONS))
            with self._responding("Auto Scaling"):
                self._open_autoscaling()

    def _open_autoscaling(self) -> None:
        try:
            self.asg.describe_auto_scaling_groups(MaxRecords=1)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            raise BackendError(
                f"Auto Scaling is missing at {self.place}: DescribeAutoScalingGroups returns {status}"
                f" {aws.code_of(error)}."
            ) from error
        if not self._keep_template:
            self._create_template()

    def _create_template(self) -> None:
        ec2 = self._own(aws.client(self.endpoint, "ec2", connections=1))
        self._has_new_template = True
        try:
            images = ec2.describe_images(Owners=["amazon"])["Images"]
            ec2.create_launch_template(
                LaunchTemplateName=self.template,
                LaunchTemplateData={
                    "ImageId": images[0]["ImageId"] if images else "ami-0123456789abcdef0",
                    "InstanceType": "t3.micro",
                },
            )
        except ClientError as error:
            self._has_new_template = False
            raise UsageError(
                f"A launch template cannot be created at {self.place}:"
                f" {error.operation_name} returns {aws.code_of(error)}.",
                remedy="Name an existing launch template with --template NAME.",
            ) from error

    def _own(self, client: C) -> C:
        """Make the client refuse calls after the end of the run, and return the client.

        Raise UsageError if the run tests AWS, but the AWS configuration names another endpoint.
        """
        url = client.meta.endpoint_url
        if self.endpoint.url is None and ".amazonaws." not in url:
            raise UsageError(
                f"The AWS configuration names {url} in place of AWS.",
                remedy="Unset AWS_ENDPOINT_URL, or name this address with --endpoint.",
            )
        client.meta.events.register("before-call", self._check_open)
        return client

    def _open_bucket(self) -> None:
        # Send a read request before the first creation. If the endpoint does not respond, the run has not created a
        # resource yet.
        response = answer("HeadBucket", lambda: self.s3.head_bucket(Bucket=self.bucket))
        if not self._keep_bucket:
            self._has_new_bucket = True
            aws.create_bucket(self.endpoint, self.bucket)
            return
        if response.status == 404:
            raise UsageError(
                f"The bucket {self.bucket} does not exist at {self.place}.",
                remedy="Without --bucket, the run creates and removes a bucket.",
            )
        if self.s3.get_bucket_versioning(Bucket=self.bucket).get("Status"):
            raise UsageError(
                f"The bucket {self.bucket} has versioning, so the objects of this run would remain in it.",
                remedy="Without --bucket, the run creates and removes a bucket.",
            )

    @contextmanager
    def _responding(self, service: str) -> Iterator[None]:
        try:
            with aws.translate_errors(f"{service} at {self.place}"):
                yield
        except Unreachable as error:
            raise Unreachable(
                f"{service} does not respond at {self.place}.",
                remedy="Start the service at this address, or correct the address.",
            ) from error

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Make `close` wait for the end of the `with` block, because the block creates resources."""
        with self._changed:
            # A check that exceeded its time limit may still run after the end of the run, and must not create
            # resources.
            self._check_open()
            self._creating += 1
        try:
            yield
        finally:
            with self._changed:
                self._creating -= 1
                self._changed.notify_all()

    def create_queue(self, name: str, attributes: dict[str, str]) -> Mapping[str, Any]:
        """Call CreateQueue, and record the queue for removal after the run."""
        with self.creating():
            exists = name in self._queues
            self.record_queue(name)
            try:
                response = self.sqs.create_queue(QueueName=name, Attributes=cast("Any", attributes))
            except ClientError:
                if not exists:
                    del self._queues[name]
                raise
            self._queues[name] = response["QueueUrl"]
            return response

    def create_group(self, name: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Call CreateAutoScalingGroup, and record the group for removal after the run."""
        with self.creating():
            self.record_group(name)
            parameters: Any = {**request, "AutoScalingGroupName": name}
            return cast("Mapping[str, Any]", self.asg.create_auto_scaling_group(**parameters))

    def record_group(self, name: str) -> None:
        """Record an Auto Scaling group for removal after the run. The caller creates the group afterwards."""
        self._groups.add(name)

    def record_queue(self, queue: str) -> None:
        """Record a queue for removal after the run. The caller creates the queue afterwards."""
        self._queues.setdefault(queue, "")

    def close(self) -> list[str]:
        """Remove all resources that the run created. Return a message for each resource that remains."""
        with self._changed:
            self._closed = True
            # Wait at most `ANSWER_S` seconds, because a request that creates a resource does not take longer.
            self._changed.wait_for(lambda: not self._creating, aws.ANSWER_S)
        cleaner = Cleaner(self.endpoint)
        remaining = cleaner.queues(self._queues)
        remaining += cleaner.groups(sorted(self._groups))
        if self._has_new_template:
            remaining += cleaner.template(self.template)
        if self._has_new_bucket or self._keep_bucket:
            remaining += cleaner.objects(self.bucket, f"{self.run}/", with_bucket=self._has_new_bucket)
        return remaining
