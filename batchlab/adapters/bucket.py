"""Description of a bucket for the adapter that opens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchlab.core.atomic_write import Sync
from batchlab.core.request_counter import Tally

if TYPE_CHECKING:
    from batchlab.adapters.aws.endpoint import Endpoint


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket: a folder, or a name at a service. An adapter uses the fields that it needs."""

    name: str = ""
    folder: Path = Path()
    sync: Sync = Sync.JOBS
    endpoint: Endpoint | None = None
    tally: Tally | None = None
    """Counter of requests."""
