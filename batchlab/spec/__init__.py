"""The job file: load, validate, explain, compile. Nothing of the user's code is run for it."""

from batchlab.spec.jobfile import JobFile, load, source_digest
from batchlab.spec.jobfile import compile_job as compile  # noqa: A004 - read as spec.compile
from batchlab.spec.json_schema import json_schema
from batchlab.spec.problems import JobFileErrors
from batchlab.spec.starter import starter

__all__ = [
    "JobFile",
    "JobFileErrors",
    "compile",
    "json_schema",
    "load",
    "source_digest",
    "starter",
]
