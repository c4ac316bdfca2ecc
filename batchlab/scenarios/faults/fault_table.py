"""Which fault exists on which backend: how it comes about there, or why it cannot be.

Invariant: an injector does exactly what its row says; docs/faults.md and `scenario faults` print
this table and no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from batchlab.scenarios.model.values import FaultName

BACKENDS = ("local", "ministack", "localstack", "aws")
"""The backends with faults. On any other backend, a replay skips every fault."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault on one backend: `how` it is injected, or `why_not`; one of the two is empty."""

    how: str = ""
    why_not: str = ""

    @property
    def possible(self) -> bool:
        return bool(self.how)


def _never(why: str) -> Cell:
    return Cell(why_not=why)


_KILLED = Cell("SIGKILL to the worker's process and all that it has started")
_STOPPED = Cell("SIGSTOP to the worker's processes, SIGCONT when it is over")
_ASKED = Cell(
    "SIGTERM, as the launcher asks an instance to drain, and SIGKILL when the notice is over; "
    "instances have no market here, so any of them is taken"
)
_RESTARTED = Cell(
    "SIGKILL to the manager's process; when it is over another one is started at its address"
)
_FORGOTTEN = Cell(
    "every row of the ledger is deleted; when it is over the manager rebuilds it from the bucket"
)
_TWICE = Cell("messages are received, a copy of each is sent, and the original given back as well")
_LATE = Cell("messages are received and kept from everybody until it is over, 15 minutes at most")
_UNSUPPORTED = _never("No fault is implemented for this backend.")
_NO_ZONES = _never("Instances are processes of one machine, which is in no zone.")
_HOG = Cell("programs that write and fsync without a pause on the disk of the workers' folders")

TABLE: Mapping[FaultName, Mapping[str, Cell]] = {
    FaultName.KILL: {
        "local": _KILLED,
        "ministack": _KILLED,
        "localstack": Cell("docker kill: SIGKILL to the container's first process"),
        "aws": Cell("EC2 TerminateInstances that skips the shutdown of the operating system"),
    },
    FaultName.PAUSE: {
        "local": _STOPPED,
        "ministack": _STOPPED,
        "localstack": Cell("docker pause, docker unpause when it is over"),
        "aws": _never(
            "EC2 has no call that halts an instance and lets it go on, and the stack lets nobody "
            "run commands on its workers."
        ),
    },
    FaultName.PARTITION: {
        "local": _never(
            "Bucket and queues are files of the same machine: there is no network to be cut."
        ),
        "ministack": Cell(
            "the front before the grid's endpoint leaves every request of the instances without "
            "an answer until it is over"
        ),
        "localstack": Cell("docker network disconnect, docker network connect when it is over"),
        "aws": _never(
            "A security group does not end connections that stand, and a network ACL cuts off "
            "whole subnets, the manager's with them."
        ),
    },
    FaultName.SPOT_WAVE: {
        "local": _ASKED,
        "ministack": _ASKED,
        "localstack": Cell(
            "the Auto Scaling endpoint gives Spot instances their interruption notice, and ends "
            "by force whoever is there when it is over"
        ),
        "aws": Cell(
            "TerminateInstanceInAutoScalingGroup, which the instance reads in its metadata as its "
            "target state, and EC2 TerminateInstances when the notice is over: a Spot "
            "interruption itself EC2 sends only by an experiment of AWS FIS"
        ),
    },
    FaultName.ZONE_LOSS: {
        "local": _NO_ZONES,
        "ministack": _NO_ZONES,
        "localstack": Cell(
            "the zone is taken from the groups by UpdateAutoScalingGroup (a group that has no "
            "other launches nothing: SuspendProcesses), then docker kill to all that is in it; "
            "the zone is given back when it is over"
        ),
        "aws": Cell(
            "the zone's subnets are taken from the groups by UpdateAutoScalingGroup (a group that "
            "has no other launches nothing: SuspendProcesses), then EC2 TerminateInstances for all "
            "that is in it; they are given back when it is over"
        ),
    },
    FaultName.S3_ERRORS: {
        "local": _never("The bucket is a folder: no request is made that could be answered 503."),
        "ministack": Cell("a front before the grid's endpoint answers 503 SlowDown to a share"),
        "localstack": Cell(
            "a front takes LocalStack's address on the grid's network and answers 503 SlowDown to "
            "a share of what it passes on; LocalStack has it back when it is over"
        ),
        "aws": _never(
            "Nothing of the user's stands between the instances and S3, and S3 itself takes no "
            "order to answer 503."
        ),
    },
    FaultName.SQS_DUPLICATES: dict.fromkeys(BACKENDS, _TWICE),
    FaultName.SQS_DELAYS: dict.fromkeys(BACKENDS, _LATE),
    FaultName.SLOW_DISK: {
        "local": _HOG,
        "ministack": _HOG,
        "localstack": _never(
            "An instance writes to memory alone (its root is read-only, /tmp a tmpfs): it has no "
            "disk that could be slow."
        ),
        "aws": _never("The stack lets nobody run commands on its workers."),
    },
    FaultName.MANAGER_CRASH: {
        "local": _RESTARTED,
        "ministack": _RESTARTED,
        "localstack": Cell(
            "SIGKILL to the first process of the manager's container, which Docker starts again at "
            "once"
        ),
        "aws": Cell(
            "EC2 TerminateInstances for the manager's instance, which its Auto Scaling group "
            "replaces"
        ),
    },
    FaultName.DATABASE_LOSS: {
        "local": _FORGOTTEN,
        "ministack": _FORGOTTEN,
        "localstack": Cell(
            "PostgreSQL is killed and started again by Docker, and every row of the ledger "
            "deleted; when it is over the manager rebuilds it from the bucket"
        ),
        "aws": Cell(
            "RDS is rebooted, a SimpleDB ledger is emptied, a file is lost with the manager's "
            "instance; when it is over the manager rebuilds the ledger from the bucket"
        ),
    },
}


def cell(fault: FaultName, backend: str) -> Cell:
    """How that fault comes about on that backend, or why it cannot be."""
    return TABLE[fault].get(backend, _UNSUPPORTED)


def impossible(backend: str) -> dict[FaultName, str]:
    """The faults that cannot be on that backend, each with its reason, as a part of a sentence."""
    cells = {fault: cell(fault, backend) for fault in FaultName}
    return {
        fault: one.why_not.removesuffix(".") for fault, one in cells.items() if not one.possible
    }


def rows(backends: tuple[str, ...] = BACKENDS) -> Iterator[tuple[FaultName, str, Cell]]:
    """Every fault on each of these backends, in the order of FaultName."""
    for fault in FaultName:
        for backend in backends:
            yield fault, backend, cell(fault, backend)
