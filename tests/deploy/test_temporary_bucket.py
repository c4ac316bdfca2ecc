"""The temporary bucket of a plan, which AWS may have created although its answer did not arrive."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from botocore.exceptions import ClientError

from batchlab.core.errors import BackendError
from batchlab.deploy import plan
from batchlab.deploy.account import Account


class S3:
    """S3 with buckets. `after_creation` runs after the creation of a bucket, and before the answer."""

    def __init__(self, after_creation: Callable[[], None]) -> None:
        self.buckets: list[str] = []
        self.after_creation = after_creation

    def create_bucket(self, Bucket: str, **_: object) -> None:  # noqa: N803 - the name of boto3
        self.buckets.append(Bucket)
        self.after_creation()

    def put_bucket_tagging(self, **_: object) -> None: ...

    def delete_bucket(self, Bucket: str) -> None:  # noqa: N803
        if Bucket not in self.buckets:
            raise ClientError({"Error": {"Code": "NoSuchBucket", "Message": "It does not exist."}}, "DeleteBucket")
        self.buckets.remove(Bucket)


def account(s3: S3) -> Account:
    return cast(Account, SimpleNamespace(region="eu-west-1", client=lambda _: s3))


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_signal_during_the_creation_leaves_no_bucket() -> None:
    s3 = S3(raising(SystemExit(130)))
    with pytest.raises(SystemExit), plan._temporary_bucket(account(s3), "batchlab"):
        pytest.fail("The bucket must not be used.")
    assert s3.buckets == []


def test_refused_creation_is_the_reported_error() -> None:
    denied: Any = {"Error": {"Code": "AccessDenied", "Message": "No."}}
    s3 = S3(lambda: None)
    s3.create_bucket = lambda **_: raising(ClientError(denied, "CreateBucket"))()  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="CreateBucket"), plan._temporary_bucket(account(s3), "batchlab"):
        pytest.fail("The bucket must not be used.")
