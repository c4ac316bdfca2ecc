"""Objects port over S3, on AWS and on emulators of S3."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.adapters.aws.endpoint import Endpoint, client, create_bucket, credentials, s3_url, translate_errors
from batchlab.adapters.limits import Bucket
from batchlab.adapters.obstore_objects import PARTS_AT_ONCE, ObstoreObjects, client_options, retries
from batchlab.core.errors import AlreadyExists, BatchlabError
from batchlab.core.pricing.request_costs import RequestCounter

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef
    from obstore.store import ObjectStore, S3Config


log = logging.getLogger(__name__)


class S3Objects(ObstoreObjects):
    """Objects port over one S3 bucket."""

    def __init__(
        self, store: ObjectStore, endpoint: Endpoint, bucket: str, tally: RequestCounter | None = None
    ) -> None:
        super().__init__(store, tally)
        self._endpoint = endpoint
        self._bucket = bucket

    def _make_bucket(self) -> bool:
        if not self._endpoint.url:
            return False
        create_bucket(self._endpoint, self._bucket)
        return True

    def _create_in_parts(self, key: str, path: Path, part_bytes: int) -> None:
        # obstore does not support a conditional upload in parts, so a conditional upload in parts uses boto3.
        _create_in_parts(self._endpoint, self._bucket, key, path, part_bytes)


def open_objects(bucket: Bucket) -> S3Objects:
    """Open the bucket at its S3 endpoint. See `open_s3`."""
    assert bucket.endpoint is not None
    return open_s3(bucket.endpoint, bucket.name, bucket.tally)


def open_s3(endpoint: Endpoint, bucket: str, tally: RequestCounter | None = None) -> S3Objects:
    """Return the S3 bucket named `bucket` without a request to S3. `tally` counts the requests to the bucket.

    If the endpoint has a url, a missing bucket is created, even while the grid runs. An emulator that has lost its
    state is empty, and the grid must see the bucket as empty. On AWS, a missing bucket raises BackendError. A missing
    bucket never raises NotFound, because NotFound would mean that nothing has been committed.
    """
    from obstore.store import S3Store

    url = s3_url(endpoint)
    config: S3Config = {"region": endpoint.region, "conditional_put": "etag", "endpoint": url}
    store = S3Store(
        bucket,
        config=config,
        client_options=client_options(url),
        retry_config=retries(),
        credential_provider=credentials(endpoint),
    )
    return S3Objects(store, endpoint, bucket, tally)


def _create_in_parts(endpoint: Endpoint, bucket: str, key: str, path: Path, part_bytes: int) -> None:
    """Upload a file in parts. Raise AlreadyExists if the object exists when the upload ends."""

    def upload(number: int) -> CompletedPartTypeDef:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        part = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": part["ETag"]}

    with closing(client(endpoint, "s3", connections=PARTS_AT_ONCE)) as s3, translate_errors(f"Object {key!r}"):
        upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        count = -(-path.stat().st_size // part_bytes)
        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
                parts = [*threads.map(upload, range(1, count + 1))]
            s3.complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except s3.exceptions.NoSuchUpload as error:
            # boto3 may have sent the request CompleteMultipartUpload twice, and the first request may have completed
            # the upload.
            listed = s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
            if any(entry["Key"] == key for entry in listed):
                raise AlreadyExists(f"Object {key!r} exists.") from error
            raise
        except BaseException:
            _abort(s3, bucket, key, upload_id)
            raise


def _abort(s3: S3Client, bucket: str, key: str, upload_id: str) -> None:
    """Remove the parts of an incomplete upload.

    If the removal fails, the bucket's lifecycle rule removes the parts later.
    """
    try:
        with translate_errors(f"Object {key!r}"):
            s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except BatchlabError as error:
        log.warning("parts of an unfinished upload stay for a while: %s", error)
