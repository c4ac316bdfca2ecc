"""The Python API: a grid as a context manager, functions mapped over items, job files run.

Invariant: nothing is submitted before all it needs is in the bucket, and nothing that was
submitted here runs on when nobody can take its results any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from batchlab import backends
from batchlab.client import Client
from batchlab.errors import AlreadyExists, JobFailed, TaskFailed, UsageError
from batchlab.grid.incoming import Incoming, decoded
from batchlab.grid.link import POLL_S, Link
from batchlab.grid.shipping import Shipping
from batchlab.home import find_home
from batchlab.manager.plans import PART_ITEMS, PartWriter
from batchlab.model import (
    ENDED,
    JobDef,
    JobId,
    JobState,
    Json,
    Pool,
    RetryRule,
    StageDef,
    StageName,
    TaskSet,
)
from batchlab.protocol import naming, values
from batchlab.task import File

if TYPE_CHECKING:
    from batchlab.spec.jobfile import JobFile
    from batchlab.views import FailureView, JobView

__all__ = ["Grid", "JobResult"]

MAP = StageName("map")
