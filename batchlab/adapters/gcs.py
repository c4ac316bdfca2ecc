"""Objects port over Google Cloud Storage.

obstore uses the XML API and finds credentials like Google's own tools: in the file that
GOOGLE_APPLICATION_CREDENTIALS names, in the login of `gcloud auth application-default`, or at the
metadata server. STORAGE_EMULATOR_HOST names an emulator, which needs no credentials.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.store import GCSStore

from batchlab.adapters.obstore_objects import PARTS_AT_ONCE, ObstoreObjects, client_options, retries
from batchlab.core.errors import AlreadyExists, BackendError

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import GCSConfig

    from batchlab.adapters.limits import Bucket

_URL = "https://storage.googleapis.com"
_EMULATOR = "STORAGE_EMULATOR_HOST"
_STAGED = "staged/"
"""Prefix of files that are uploaded but do not have their key yet."""
_DELETES_AT_ONCE = 16


class GcsObjects(ObstoreObjects):
    """The Objects port over a bucket of Google Cloud Storage.

    Conditions of writes are generation preconditions. Generation 0 stands for a missing object.
    """

    def _unless_changed(self, key: str, etag: str) -> PutMode:
        # The condition of a write is a generation, while a listing shows only the ETag. If another
        # writer replaces the object after this request, the generation differs and the put fails.
        self._tally.get()
        found = obstore.head(self._store, key)
        if found["e_tag"] != etag:
            raise AlreadyExists(f"Object {key!r} is another one by now.")
        return {"e_tag": etag, "version": found["version"]}

    def _create_in_parts(self, key: str, path: Path, part_bytes: int) -> None:
        # A copy supports a condition, but an upload in parts does not. The copy moves no data.
        staged = f"{_STAGED}{secrets.token_hex(16)}"
        obstore.put(self._store, staged, path, chunk_size=part_bytes, max_concurrency=PARTS_AT_ONCE)
        try:
            self._tally.put()
            obstore.copy(self._store, staged, key, overwrite=False)
        finally:
            self._delete([staged])

    def _delete(self, keys: Sequence[str]) -> None:
        # The XML API deletes one object per request, and answers 404 if it does not exist.
        with ThreadPoolExecutor(_DELETES_AT_ONCE) as threads:
            for _ in threads.map(self._delete_one, keys):
                pass

    def _delete_one(self, key: str) -> None:
        self._tally.delete()
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise


def check(bucket: Bucket) -> None:
    """Raise BackendError unless the bucket can be listed."""
    try:
        open_objects(bucket).check()
    except BackendError as error:
        raise BackendError(
            f"The bucket gs://{bucket.name} cannot be listed: {error.message}",
            remedy="Create the bucket, and log in with `gcloud auth application-default login`.",
        ) from error


def open_objects(bucket: Bucket) -> GcsObjects:
    """Return the bucket of that name without a request to the service."""
    config: GCSConfig = {"base_url": _URL}
    if emulator := os.environ.get(_EMULATOR):
        url = emulator if "://" in emulator else f"http://{emulator}"
        config = {"base_url": url, "bearer_token": "emulator"}
    options = client_options(config["base_url"])
    store = GCSStore(bucket.name, config=config, client_options=options, retry_config=retries())
    return GcsObjects(store, bucket.tally)
