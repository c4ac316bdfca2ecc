"""What EC2's instance metadata says of one instance, as a tree of paths (pure).

Paths, values and formats are those of AWS's "Instance metadata categories"; a path that is not in
the tree is one that a real instance of that kind would answer with 404, or one that nobody here
asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from batchlab.model import Machine, Market
from batchlab.ports import ANY_MACHINE

ROOT = "latest/"

_REGION = re.compile(r"[a-z]+(?:-[a-z]+)+?-\d+")
_TAG = re.compile(r"[A-Za-z0-9+\-=.,_:@]+")


@dataclass(frozen=True, slots=True)
class Interruption:
    """A Spot interruption notice: what happens (terminate, stop, hibernate) and when (epoch)."""

    at_s: float
    action: str = "terminate"


@dataclass(frozen=True, slots=True)
class Signals:
    """What the platform tells an instance about its future."""

    lifecycle: str = "InService"
    """The state its Auto Scaling group moves it to; "" where it has no group."""
    interruption: Interruption | None = None
    rebalance_s: float | None = None
    """When a rebalance recommendation came (epoch): a Spot interruption has become more likely."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """The facts about one instance.

    `credentials` are documents by role name, as IAM gives them. Times are seconds of the epoch.
    """

    instance: str
    address: str
    machine: Machine = ANY_MACHINE
    launched_s: float = 0.0
    image: str = ""
    architecture: str = "x86_64"
    account: str = "000000000000"
    tags: Mapping[str, str] = field(default_factory=dict)
    credentials: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    signals: Signals = Signals()
    user_data: str = ""

    @property
    def region(self) -> str:
        """The region that the zone is of: us-west-2 of us-west-2b and of us-west-2-lax-1a."""
        found = _REGION.match(self.machine.zone)
        return found[0] if found else ""


def tree(of: Metadata) -> dict[str, str]:
    """Content by path below `latest/`; what is empty is left out, and is then a 404."""
    machine, signals = of.machine, of.signals
    spot = machine.market is Market.SPOT
    meta = {
        "ami-id": of.image,
        "autoscaling/target-lifecycle-state": signals.lifecycle,
        "hostname": of.instance,
        "instance-id": of.instance,
        "instance-life-cycle": "spot" if spot else "on-demand",
        "instance-type": machine.type,
        "local-hostname": of.instance,
        "local-ipv4": of.address,
        "placement/availability-zone": machine.zone,
        "placement/region": of.region,
    }
    if signals.rebalance_s is not None:
        told = {"noticeTime": iso(signals.rebalance_s)}
        meta["events/recommendations/rebalance"] = json.dumps(told)
    if signals.interruption is not None:
        action, at = signals.interruption.action, iso(signals.interruption.at_s)
        meta["spot/instance-action"] = json.dumps({"action": action, "time": at})
        if action == "terminate":
            meta["spot/termination-time"] = at
    for role, document in of.credentials.items():
        meta[f"iam/security-credentials/{role}"] = json.dumps(document, indent=2)
    for name, value in of.tags.items():
        # EC2 takes no other names where tags are in the metadata.
        if _TAG.fullmatch(name):
            meta[f"tags/instance/{name}"] = value
    paths = {f"meta-data/{path}": content for path, content in meta.items() if content}
    paths["dynamic/instance-identity/document"] = _document(of)
    if of.user_data:
        paths["user-data"] = of.user_data
    return paths


def answer(paths: Mapping[str, str], path: str) -> str | None:
    """What is at `path` below `latest/`: its content, or the list of what is below it; None where
    there is nothing."""
    path = path.rstrip("/")  # as boto3 asks for the zone
    if path in paths:
        return paths[path]
    folder = f"{path}/" if path else ""
    below = (p.removeprefix(folder).partition("/") for p in paths if p.startswith(folder))
    names = {name + slash for name, slash, _ in below}
    return "\n".join(sorted(names)) or None


def iso(epoch_s: float) -> str:
    """Whole seconds, as the metadata service writes times."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _document(of: Metadata) -> str:
    return json.dumps(
        {
            "accountId": of.account,
            "architecture": of.architecture,
            "availabilityZone": of.machine.zone,
            "billingProducts": None,
            "devpayProductCodes": None,
            "imageId": of.image,
            "instanceId": of.instance,
            "instanceType": of.machine.type,
            "kernelId": None,
            "marketplaceProductCodes": None,
            "pendingTime": iso(of.launched_s),
            "privateIp": of.address,
            "ramdiskId": None,
            "region": of.region,
            "version": "2017-09-30",
        },
        indent=2,
    )
