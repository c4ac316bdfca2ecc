"""The table of all checks.

Invariant: every name is there once, and begins with the service it is about.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from batchlab.conform.check import Check
from batchlab.conform.s3_create import S3_CREATE
from batchlab.conform.s3_list import S3_LIST
from batchlab.conform.s3_ports import S3_PORTS
from batchlab.conform.s3_read import S3_READ
from batchlab.conform.s3_upload import S3_UPLOAD
from batchlab.conform.sqs_ports import SQS_PORTS
from batchlab.conform.sqs_queues import SQS_QUEUES
from batchlab.conform.sqs_receipts import SQS_RECEIPTS
from batchlab.conform.sqs_receive import SQS_RECEIVE
from batchlab.conform.sqs_send import SQS_SEND

CHECKS: tuple[Check, ...] = (
    *(*S3_CREATE, *S3_READ, *S3_LIST, *S3_UPLOAD, *S3_PORTS),
    *(*SQS_SEND, *SQS_RECEIVE, *SQS_RECEIPTS, *SQS_QUEUES, *SQS_PORTS),
)


def matching(pattern: str) -> list[Check]:
    """The checks whose name matches a shell pattern, in order."""
    return [check for check in CHECKS if fnmatchcase(check.name, pattern)]
