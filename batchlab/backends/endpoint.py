"""Endpoints that a user names, with a bucket as their path, and names of buckets."""

from __future__ import annotations

import re
import secrets

from batchlab.errors import UsageError
from batchlab.home import Place

VARIABLE = "BATCHLAB_ENDPOINT"
"""Environment variable that names an endpoint where no option does."""

_ENDPOINT = re.compile(
    r"(?P<url>https?://[^/?#@\s]+)/?(?P<bucket>[a-z0-9][a-z0-9-]{1,26}[a-z0-9])?/?"
)
# The bucket's name begins the names of queues, of which SQS takes 80 characters without dots; that
# of a pool's dead letters takes 51 of them.


def place_of(endpoint: str, scheme: str = "") -> Place:
    """Return the URL and the bucket, which is "" if the endpoint names none; UsageError.

    With a `scheme`, the endpoint must be the address of a bucket, such as gs://my-bucket.
    """
    if scheme:
        return _bucket_of(endpoint, scheme)
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None:
        # A name and password in it are for nobody's eyes.
        shown = re.sub(r"//[^/@]*@", "//…@", endpoint)
        raise UsageError(
            f"The endpoint {shown!r} is not a URL with a bucket's name as its path.",
            remedy="Write for example http://127.0.0.1:4566 or http://127.0.0.1:4566/my-bucket, "
            "with 3 to 28 small letters, digits and hyphens.",
        )
    return Place(found["url"], found["bucket"] or "", named=True)


def _bucket_of(address: str, scheme: str) -> Place:
    found = re.fullmatch(rf"({scheme}://)([a-z0-9][a-z0-9._-]{{1,220}}[a-z0-9])/?", address)
    if found is None:
        raise UsageError(
            f"The endpoint {address!r} is not the address of a bucket.",
            remedy=f"Write for example {scheme}://my-bucket.",
        )
    return Place(found[1], found[2], named=True)


def fresh_bucket() -> str:
    """A name that no other grid has."""
    return f"batchlab-{secrets.token_hex(5)}"
