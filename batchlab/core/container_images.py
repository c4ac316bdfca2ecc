"""References of container images, such as `registry/tools:1@sha256:…`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from batchlab.core.errors import Malformed, UsageError
from batchlab.core.protocol.field_checks import UNREADABLE

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


# --- The manager's record of the images of pools -------------------------------------------------

MAX_IMAGES = 50
"""Maximum number of recorded images of a pool. The oldest image is dropped first."""

REPAIR = "Restore or delete the object grid/pool-images.json, and restart the manager."
"""Remedy for an unreadable record."""

Images = dict[str, list[str]]
"""Images of each pool by name of the pool, with the current image at the end."""


def with_current(images: Images, current: Mapping[str, str]) -> Images:
    """Return the record `images` with the pools' current images at the end of their lists."""
    recorded = dict(images)
    for pool, image in current.items():
        if image or pool in recorded:
            recorded[pool] = [*(one for one in recorded.get(pool, []) if one != image), image][-MAX_IMAGES:]
    return recorded


def encode_images(images: Images) -> bytes:
    """Return the content of the object that records the images of pools."""
    return json.dumps({"v": 1, "pools": images}, sort_keys=True).encode()


def decode_images(data: bytes) -> Images:
    """Return the images of pools in a stored object. Raise Malformed for an invalid object."""
    try:
        return {pool: [_recorded(image) for image in images[-MAX_IMAGES:]] for pool, images in _lists(data).items()}
    except (*UNREADABLE, UsageError) as error:
        raise Malformed(
            f"The record of the images of pools cannot be read ({type(error).__name__}: {error}).", remedy=REPAIR
        ) from error


def _lists(data: bytes) -> dict[str, list[object]]:
    pools: dict[str, list[object]] = json.loads(data)["pools"]
    if not all(isinstance(images, list) for images in pools.values()):
        raise ValueError("the images of a pool are not a list")
    return pools


def _recorded(image: object) -> str:
    """Return a recorded image, or "" for a time when the pool had no image. Raise an error for other values."""
    if not isinstance(image, str):
        raise TypeError(f"{image!r:.50} is not the name of an image")
    return check_image(image, "pools") if image else ""


def image_of_worker(recorded: Sequence[str], claimed: str) -> str:
    """Return the image in which a worker of a pool ran, or "" without an image.

    `recorded` has the images that the manager has recorded for the pool. The worker's own report `claimed` is not
    trusted, so it only selects one of the recorded images.
    """
    if claimed in recorded:
        return claimed
    return recorded[-1] if recorded else ""
