"""Sets of stack parameters that together create each resource of the template at least once."""

from __future__ import annotations

from typing import Any

RELEASE = "0123456789abcdef" * 4
TOPICS = tuple(f"arn:aws:sns:us-east-1:123456789012:batchlab-{end}" for end in ("ends", "caps.fifo"))
SHAPES: dict[str, dict[str, Any]] = {
    "empty": {},
    "endpoints": {"Release": RELEASE, "AlarmEmail": "ops@example.org", "PoolPeakMin": 2},
    "postgres": {
        "Release": RELEASE,
        "Ledger": "postgres",
        "Egress": "nat",
        "Versioning": "on",
        "AttemptDays": 30,
        "BudgetUsd": 100,
        "DatabaseZones": "two",
        "ContainerImage": "123456789012.dkr.ecr.us-east-1.amazonaws.com/grid:1",
    },
    "simpledb": {
        "Release": RELEASE,
        "Ledger": "simpledb",
        "Egress": "nat",
        "Retain": "no",
        "PoolImage": "123456789012.dkr.ecr.us-east-1.amazonaws.com/tools:1",
    },
    "own-network": {
        "Release": RELEASE,
        "VpcId": "vpc-0123456789abcdef0",
        "SubnetIds": "subnet-0123456789abcdef0,subnet-0123456789abcdef1",
        "Ledger": "postgres",
        "DatabaseLogin": "iam",
        "NotifyTopics": ",".join(TOPICS),
        "WorkerPolicies": "arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess",
        "PermissionsBoundary": "arn:aws:iam::123456789012:policy/boundary",
    },
}
