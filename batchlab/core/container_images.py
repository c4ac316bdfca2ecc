"""References of container images, such as `registry/tools:1@sha256:…`."""

from __future__ import annotations

import re

from batchlab.core.errors import UsageError

VARIABLE = "BATCHLAB_POOL_IMAGE"
"""Environment variable of a worker with the reference of its pool's image."""

_REFERENCE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:/-]{0,199}(@sha256:[0-9a-f]{64})?")


def check_image(reference: str, where: str) -> str:
    """Return a valid reference of an image unchanged. Raise UsageError for an invalid reference.

    Valid references have no character that a shell, a TOML file, or the option --pool reads differently.
    """
    if not _REFERENCE.fullmatch(reference):
        raise UsageError(
            f"{where}: {reference!r} is not the name of a container image.",
            remedy="Write for example registry/name:tag or registry/name@sha256:DIGEST.",
        )
    return reference


def name_of(reference: str) -> str:
    """Return a reference without its digest, such as `registry/tools:1`."""
    return reference.partition("@")[0]


def digest_of(reference: str) -> str:
    """Return the digest of a reference, such as `sha256:…`, or "" if the reference does not have a digest."""
    return reference.partition("@")[2]


def repository_of(reference: str) -> str:
    """Return a reference without its tag and its digest. The port of a registry is not a tag."""
    folder, slash, last = name_of(reference).rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}"
