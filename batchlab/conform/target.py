"""Endpoint under test: its clients, and the resources that a run creates there.

Invariants: every resource has the run's name and is recorded before it is created. `close` removes
all of them, however the run ended, and nothing is created after `close` starts. boto3 does not
retry, so a check sees the first response.

The removal uses new clients, because those of the run are closed by then. It removes only resources
of the run, and it stops as soon as the endpoint no longer responds.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

AT_ONCE = 8

_GONE = ("NonExistentQueue", "QueueDoesNotExist", "NoSuchBucket", "404")


class Cleaner:
    """Removal of a run's resources. Each method returns messages about what it could not remove."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._silent = ""

    def queues(self, urls: Mapping[str, str]) -> list[str]:
        """Remove queues, given their URLs by name. If a URL is empty, look it up."""
        if not urls:
            return []
        sqs = aws.client(self._endpoint, "sqs", connections=AT_ONCE)

        def remove(name: str, url: str) -> str:
            def delete() -> str:
                sqs.delete_queue(QueueUrl=url or sqs.get_queue_url(QueueName=name)["QueueUrl"])
                return ""

            reason = self._tried(delete)
            return f"queue {name}: {reason}" if reason else ""

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="conform-close") as threads:
            return [one for one in threads.map(remove, urls, urls.values()) if one]

    def groups(self, names: Sequence[str]) -> list[str]:
        """Remove these Auto Scaling groups with their instances, if they exist."""
        if not names:
            return []
        asg = aws.client(self._endpoint, "autoscaling", connections=AT_ONCE)

        def remove(name: str) -> str:
            def delete() -> str:
                try:
                    asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
                except (ClientError, ResponseParserError):
                    # The error code does not reveal whether the group exists.
                    found = asg.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
                    if found["AutoScalingGroups"]:
                        raise
                return ""

            reason = self._tried(delete)
            return f"Auto Scaling group {name}: {reason}" if reason else ""

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="conform-close") as threads:
            return [one for one in threads.map(remove, names) if one]

    def template(self, name: str) -> list[str]:
        """Remove this launch template."""
        ec2 = aws.client(self._endpoint, "ec2", connections=1)

        def delete() -> str:
            ec2.delete_launch_template(LaunchTemplateName=name)
            return ""

        reason = self._tried(delete)
        return [f"launch template {name}: {reason}"] if reason else []

    def objects(self, bucket: str, prefix: str, *, with_bucket: bool) -> list[str]:
        """Remove the objects and uploads below `prefix`.

        Remove the bucket if the run created it.
        """
        s3 = aws.client(self._endpoint, "s3", connections=1)

        def remove() -> str:
            _abort_uploads(s3, bucket, prefix)
            # A paginator could loop forever on an endpoint that pages or deletes incorrectly.
            before: list[str] = []
            while keys := _first_keys(s3, bucket, prefix):
                if keys == before:
                    return "its objects cannot be deleted"
                s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})
                before = keys
            if with_bucket:
                s3.delete_bucket(Bucket=bucket)
            return ""

        what = f"bucket {bucket}" if with_bucket else f"objects below {bucket}/{prefix}"
        reason = self._tried(remove)
        return [f"{what}: {reason}"] if reason else []

    def _tried(self, remove: Callable[[], str]) -> str:
        """Return the reason of a failure, or "" if the resource was removed or did not exist."""
        if self._silent:
            return self._silent
        try:
            return remove()
        except ClientError as error:
            code = aws.code_of(error)
            return "" if code in _GONE else f"{error.operation_name} returns {code}"
        except ResponseParserError:
            return "the answer is not one of AWS"
        except BotoCoreError as error:
            self._silent = f"there is no answer ({type(error).__name__})"
            return self._silent


def _abort_uploads(s3: S3Client, bucket: str, prefix: str) -> None:
    for upload in s3.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        if upload["Key"].startswith(prefix):
            s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _first_keys(s3: S3Client, bucket: str, prefix: str) -> list[str]:
    page = s3.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [one["Key"] for one in page.get("Contents", ())]


CONNECTIONS = 64

C = TypeVar("C", bound="BaseClient")


def endpoint(url: str | None, region: str | None) -> Endpoint:
    """Return the endpoint at `url`, or AWS itself if `url` is None.

    An endpoint gets the access keys and the region from the environment, but nothing from a
    profile. Without keys, it gets those that every emulator accepts. Raise UsageError for an
    invalid URL.
    """
    if region and not re.fullmatch("[a-z0-9-]+", region):
        raise UsageError(f"{region} is not the name of a region.", remedy="Write for example eu-west-1.")
    if url is None:
        return _in_aws(region)
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
    if not named or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise UsageError(
            f"{url} is not the address of an endpoint.",
            remedy="It is http:// or https://, a host and perhaps a port: http://127.0.0.1:4566.",
        )
    if (parts.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws")):
        raise UsageError(f"{url} is AWS itself.", remedy="If that is meant, say --aws in its place.")
    env = os.environ.get
    place = region or env("AWS_REGION") or env("AWS_DEFAULT_REGION") or "us-east-1"
    keys = (env("AWS_ACCESS_KEY_ID") or "", env("AWS_SECRET_ACCESS_KEY") or "")
    return aws.Endpoint(url.rstrip("/"), place, *(keys if all(keys) else ()))


def _in_aws(region: str | None) -> Endpoint:
    session = boto3.Session(region_name=region)
    if session.get_credentials() is None:
        raise UsageError(
            "There are no AWS credentials.", remedy="Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return aws.Endpoint(None, session.region_name or "us-east-1")


class Target:
    """S3, SQS, and Auto Scaling at an endpoint.

    `run` is a short, unique name. With `bucket`, the run uses this bucket and does not remove it.
    Without it, the run creates a bucket and removes it. The same applies to `template`, a launch
    template.
    """

    def __init__(self, endpoint: Endpoint, *, run: str, clock: Clock, bucket: str = "", template: str = "") -> None:
        self.endpoint = endpoint
        self.run = run
        self.clock = clock
        self.bucket = bucket or run
        self.lag_s = 60.0 if endpoint.url is None else 0.0
        """Time in seconds for purges and new attributes to reach every part of AWS's SQS."""
        self.settles_s = self.lag_s + 10.0
        """Time in seconds for which counts may be wrong."""
        self.arrives_s = 12.0
        """Limit in seconds for the arrival of a visible message, also on a busy machine."""
        self.appears_s = 15.0
        """Limit in seconds for the start or the end of an instance, also on a busy machine."""
        self.template = template or run
        self.zone = f"{endpoint.region}a"
        self.s3: S3Client
        self.other_s3: S3Client
        """Client with its own connections, which reads what the first client has written."""
        self.sqs: SQSClient
        self.asg: AutoScalingClient
        self._objects: ObstoreObjects
        self._keep_bucket = bool(bucket)
        self._changed = threading.Condition()
        self._queues: dict[str, str] = {}
        """URLs of the queues by name. A URL is empty until it is known."""
        self._makers = 0
        self._bucket_made = False
        self._keep_template = bool(template)
        self._template_made = False
        self._groups: set[str] = set()
        self._closed = False

    @property
    def place(self) -> str:
        """Location of the endpoint, as text for a user."""
        return self.endpoint.url or f"AWS in {self.endpoint.region}"

    @property
    def objects(self) -> ObstoreObjects:
        """batchlab's own adapter for the bucket."""
        self._see_that_it_is_open()
        return self._objects

    def _see_that_it_is_open(self, **_: object) -> None:
        if self._closed:
            raise Untried("the run has ended")

    def open(self, services: Collection[str]) -> None:
        """Check that these services respond, and create the bucket.

        Raise BackendError if a service does not respond.
        """
        if "s3" in services:
            self.s3, self.other_s3 = (
                self._own(aws.client(self.endpoint, "s3", connections=CONNECTIONS)) for _ in range(2)
            )
            self._objects = open_s3(self.endpoint, self.bucket)
            with self._answering("S3"):
                self._open_bucket()
        if "sqs" in services:
            self.sqs = self._own(aws.client(self.endpoint, "sqs", connections=CONNECTIONS))
            with self._answering("SQS"):
                # Send a request first. If nothing responds, the run has not created anything.
                answer("GetQueueUrl", lambda: self.sqs.get_queue_url(QueueName=self.run))
                self.create_queue(self.run, {})
        if "autoscaling" in services:
            self.asg = self._own(aws.client(self.endpoint, "autoscaling", connections=CONNECTIONS))
            with self._answering("Auto Scaling"):
                self._open_autoscaling()

    def _open_autoscaling(self) -> None:
        try:
            self.asg.describe_auto_scaling_groups(MaxRecords=1)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            raise BackendError(
                f"There is no Auto Scaling at {self.place}: DescribeAutoScalingGroups returns"
                f" {status} {aws.code_of(error)}."
            ) from error
        if not self._keep_template:
            self._make_template()

    def _make_template(self) -> None:
        ec2 = self._own(aws.client(self.endpoint, "ec2", connections=1))
        self._template_made = True
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
            self._template_made = False
            raise UsageError(
                f"No launch template can be made at {self.place}: {error.operation_name} returns {aws.code_of(error)}.",
                remedy="Name one that is there with --template NAME.",
            ) from error

    def _own(self, client: C) -> C:
        """Return the client, which refuses calls after the end of the run.

        Raise UsageError if the run tests AWS but the configuration names another endpoint.
        """
        told = client.meta.endpoint_url
        if self.endpoint.url is None and ".amazonaws." not in told:
            raise UsageError(
                f"The AWS configuration names {told} in place of AWS.",
                remedy="Unset AWS_ENDPOINT_URL, or name it with --endpoint.",
            )
        client.meta.events.register("before-call", self._see_that_it_is_open)
        return client

    def _open_bucket(self) -> None:
        # Send a request first. If nothing responds, the run has not created anything.
        there = answer("HeadBucket", lambda: self.s3.head_bucket(Bucket=self.bucket))
        if not self._keep_bucket:
            self._bucket_made = True
            aws.create_bucket(self.endpoint, self.bucket)
            return
        if there.status == 404:
            raise UsageError(
                f"The bucket {self.bucket} does not exist at {self.place}.",
                remedy="Leave --bucket out, and one is made and removed.",
            )
        if self.s3.get_bucket_versioning(Bucket=self.bucket).get("Status"):
            raise UsageError(
                f"The bucket {self.bucket} keeps old versions of its objects, and would keep ours.",
                remedy="Leave --bucket out, and one is made and removed.",
            )

    @contextmanager
    def _answering(self, service: str) -> Iterator[None]:
        try:
            with aws.translated(f"{service} at {self.place}"):
                yield
        except Unreachable as error:
            raise Unreachable(
                f"No {service} answers at {self.place}.",
                remedy="Start what should answer there, or correct the address.",
            ) from error

    @contextmanager
    def making(self) -> Iterator[None]:
        """Enclose the creation of resources. `close` waits until it ends."""
        with self._changed:
            # An abandoned check may continue after the removal.
            self._see_that_it_is_open()
            self._makers += 1
        try:
            yield
        finally:
            with self._changed:
                self._makers -= 1
                self._changed.notify_all()

    def create_queue(self, name: str, attributes: dict[str, str]) -> Mapping[str, Any]:
        """Call CreateQueue and record the queue for removal."""
        with self.making():
            known = name in self._queues
            self.remember(name)
            try:
                made = self.sqs.create_queue(QueueName=name, Attributes=cast("Any", attributes))
            except ClientError:
                if not known:
                    del self._queues[name]
                raise
            self._queues[name] = made["QueueUrl"]
            return made

    def create_group(self, name: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Call CreateAutoScalingGroup and record the group for removal."""
        with self.making():
            self.remember_group(name)
            asked: Any = {**request, "AutoScalingGroupName": name}
            return cast("Mapping[str, Any]", self.asg.create_auto_scaling_group(**asked))

    def remember_group(self, name: str) -> None:
        """Record a group that is about to be created within `making`."""
        self._groups.add(name)

    def remember(self, queue: str) -> None:
        """Record a queue that is about to be created within `making`."""
        self._queues.setdefault(queue, "")

    def close(self) -> list[str]:
        """Remove everything that the run created.

        Return messages about what could not be removed.
        """
        with self._changed:
            self._closed = True
            # Wait as long as the slowest request may take.
            self._changed.wait_for(lambda: not self._makers, aws.ANSWER_S)
        cleaner = Cleaner(self.endpoint)
        left = cleaner.queues(self._queues)
        left += cleaner.groups(sorted(self._groups))
        if self._template_made:
            left += cleaner.template(self.template)
        if self._bucket_made or self._keep_bucket:
            left += cleaner.objects(self.bucket, f"{self.run}/", with_bucket=self._bucket_made)
        return left
