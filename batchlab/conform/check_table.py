"""Table of all checks.

Invariant: names are unique and begin with the name of the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from batchlab.conform.adapters import S3_PORTS, SQS_PORTS
from batchlab.conform.asg_groups import ASG_GROUPS
from batchlab.conform.asg_instances import ASG_INSTANCES
from batchlab.conform.check import Check
from batchlab.conform.s3_create import S3_CREATE
from batchlab.conform.s3_list import S3_LIST
from batchlab.conform.s3_read import S3_READ
from batchlab.conform.s3_upload import S3_UPLOAD
from batchlab.conform.sqs_queues import SQS_QUEUES
from batchlab.conform.sqs_receipts import SQS_RECEIPTS
from batchlab.conform.sqs_receive import SQS_RECEIVE
from batchlab.conform.sqs_send import SQS_SEND

CHECKS: tuple[Check, ...] = (
    *S3_CREATE,
    *S3_READ,
    *S3_LIST,
    *S3_UPLOAD,
    *S3_PORTS,
    *SQS_SEND,
    *SQS_RECEIVE,
    *SQS_RECEIPTS,
    *SQS_QUEUES,
    *SQS_PORTS,
)
"""Checks of S3 and SQS, which run by default."""

ASG_CHECKS: tuple[Check, ...] = (*ASG_GROUPS, *ASG_INSTANCES)
"""Checks of EC2 Auto Scaling. They run only on request, because they launch instances."""

SERVICES = ("s3", "sqs", "autoscaling")


def of_service(service: str | None) -> Sequence[Check]:
    """Return the checks of one of SERVICES, or else those of S3 and SQS."""
    if service is None:
        return CHECKS
    return [check for check in (*CHECKS, *ASG_CHECKS) if check.service == service]


def matching(pattern: str, checks: Sequence[Check] = CHECKS) -> list[Check]:
    """Return the checks whose name matches a shell pattern, in order."""
    return [check for check in checks if fnmatchcase(check.name, pattern)]
