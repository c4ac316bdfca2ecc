"""Removes what a run has made, with clients of its own: the run's are closed by then.

Invariant: it names only what the run has made, and gives up at once where nothing answers any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from batchlab.adapters import aws

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from batchlab.adapters.aws import Endpoint

AT_ONCE = 8

_GONE = ("NonExistentQueue", "QueueDoesNotExist", "NoSuchBucket", "404")


class Cleaner:
    """Each call returns what it could not remove, and why, for a person."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._silent = ""

    def queues(self, urls: Mapping[str, str]) -> list[str]:
        """Remove these queues, by their names; an empty URL is asked for."""
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
        """Remove these Auto Scaling groups with their instances, as far as they are there."""
        if not names:
            return []
        asg = aws.client(self._endpoint, "autoscaling", connections=AT_ONCE)

        def remove(name: str) -> str:
            def delete() -> str:
                try:
                    asg.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
                except (ClientError, ResponseParserError):
                    # No code says that it was not there.
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
        """Remove the objects and uploads below `prefix`, and the bucket where that was made."""
        s3 = aws.client(self._endpoint, "s3", connections=1)

        def remove() -> str:
            _abort_uploads(s3, bucket, prefix)
            # Not the paginator: an endpoint that pages or deletes wrongly must not keep us here.
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
        """Why it failed; empty where it is removed, or was not there."""
        if self._silent:
            return self._silent
        try:
            return remove()
        except ClientError as error:
            code = aws.code_of(error)
            return "" if code in _GONE else f"{error.operation_name} answers {code}"
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
