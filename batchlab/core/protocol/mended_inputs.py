"""Mended inputs: corrected inputs that users give to failed tasks of a retry.

The bundle of a task with a mended input contains only this task. The field `source` of the bundle names the mended
input, so messages, start markers, outcomes, and rows of the ledger name the input as well. Two objects store a mended
input, both below `plan/mended/` of the stage, where only a manager may write: a part of a plan with the encoded input
of the task, and, if the input is a file, the content of the file.

Invariant: the names of both objects are digests of their content, so a mended input never changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from batchlab.core.errors import Malformed
from batchlab.core.model import Bundle, BundleId, StageName

MAX_INPUT_BYTES = 16 * 1024**2
"""Maximum size of a mended input. The manager holds the mended inputs of a request in memory."""

_SOURCE = re.compile(r"mended\.([0-9a-f]{32})\.(\d{1,10})\.([0-9a-f]{64})", re.ASCII)
_PREFIX = "mended."

TaskInputs = Mapping[tuple[StageName, int], bytes]
"""Content of the mended input of each task, by stage and index of the task."""


@dataclass(frozen=True, slots=True)
class MendedInput:
    """Reference to a mended input.

    `part` is the name of the part with the encoded input. `size` is the size in bytes of the user's file, and `sha256`
    is the SHA-256 of the user's file.
    """

    part: str
    size: int
    sha256: str

    @property
    def source(self) -> BundleId:
        """Return the source of the bundle whose task has this input."""
        return BundleId(f"{_PREFIX}{self.part}.{self.size}.{self.sha256}")


def is_mended(bundle: Bundle) -> bool:
    return bundle.source is not None and bundle.source.startswith(_PREFIX)


def mended_sha256(source: str | None) -> str:
    """Return the SHA-256 of the mended input that a bundle's source names, or "" for another source."""
    match = _SOURCE.fullmatch(source or "")
    return match[3] if match else ""


def mended_input(bundle: Bundle) -> MendedInput | None:
    """Return the mended input of the bundle's only task, or None if the bundle does not have a mended input.

    Raise Malformed if the bundle names a mended input that cannot exist.
    """
    if not is_mended(bundle):
        return None
    match = _SOURCE.fullmatch(bundle.source or "")
    if match is None or len(bundle.tasks) != 1:
        raise Malformed(f"Bundle {bundle.id} of job {bundle.job} names a mended input that cannot exist.")
    part, size, sha256 = match.groups()
    return MendedInput(part, int(size), sha256)
