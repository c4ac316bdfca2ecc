"""Job file: load, validate, explain, and compile. None of this runs the user's code."""

from __future__ import annotations

from batchlab.jobs.job_file import JobFile, load, source_digest
from batchlab.jobs.job_file import compile_job as compile  # noqa: A004 - read as spec.compile
from batchlab.jobs.json_schema import json_schema
from batchlab.jobs.starter import starter
from batchlab.jobs.yaml_source import JobFileErrors

__all__ = [
    "JobFile",
    "JobFileErrors",
    "compile",
    "json_schema",
    "load",
    "source_digest",
    "starter",
]
