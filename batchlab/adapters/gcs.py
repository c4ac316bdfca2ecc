"""Objects port over Google Cloud Storage.

The library obstore uses the XML API and finds credentials like Google's own tools. The credentials come from the file
that GOOGLE_APPLICATION_CREDENTIALS names, from the login of `gcloud auth application-default`, or from the metadata
server. STORAGE_EMULATOR_HOST names an emulator. An emulator does not need credentials.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import obstore
from obstore.store import GCSStore

from batchlab.adapters.obstore_objects import ObstoreObjects, client_options, retries
from batchlab.core.errors import AlreadyExists

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import GCSConfig

    from batchlab.adapters.limits import Bucket

_URL = "https://storage.googleapis.com"
_EMULATOR = "STORAGE_EMULATOR_HOST"


class GcsObjects(ObstoreObjects):
    """The Objects port over a bucket of Google Cloud Storage.

    The condition of a write is a generation precondition. Generation 0 stands for a missing object.
    """

    deletes_in_batches = False
    remedy = "Create the bucket, and log in with `gcloud auth application-default login`."

    def _unless_changed(self, key: str, etag: str) -> PutMode:
        # The condition of a write is a generation, while a listing shows only the ETag. If another writer replaces the
        # object after this request, the object's generation differs and the put fails.
        self._tally.get()
        current = obstore.head(self._store, key)
        if current["e_tag"] != etag:
            raise AlreadyExists(f"Another writer has replaced object {key!r}.")
        return {"e_tag": etag, "version": current["version"]}


def open_objects(bucket: Bucket) -> GcsObjects:
    """Return the bucket without a request to Google Cloud Storage."""
    config: GCSConfig = {"base_url": _URL}
    if emulator := os.environ.get(_EMULATOR):
        url = emulator if "://" in emulator else f"http://{emulator}"
        config = {"base_url": url, "bearer_token": "emulator"}
    options = client_options(config["base_url"])
    store = GCSStore(bucket.name, config=config, client_options=options, retry_config=retries())
    return GcsObjects(store, bucket.tally)
