"""State of an Auto Scaling group beyond that of a plain pool: configuration, hooks, and policies.

All of it is saved. Times that end in `_s` are of the SteadyClock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batchlab.fleet.api_types import (
    GroupConfig,
    InstanceRefresh,
    LifecycleHook,
    Process,
    ScalingPolicy,
    ScheduledAction,
    Tag,
    WarmPool,
)


@dataclass(slots=True)
class Alarm:
    """The two alarms of a target-tracking policy: since when the metric is above or below."""

    above_since_s: float | None = None
    below_since_s: float | None = None
    acted_s: float | None = None
    """When the policy last changed desired capacity. It acts again after one period at the
    earliest."""


@dataclass(slots=True)
class Rolling:
    """An instance refresh in progress."""

    refresh: InstanceRefresh
    warmup: int
    """Seconds in service after which a new instance counts as ready."""
    old: set[str] = field(default_factory=set)
    """Instances still to be replaced."""
    before: set[str] = field(default_factory=set)
    """All instances of the group at the start. A rollback replaces the others."""
    warm: set[str] = field(default_factory=set)
    """Instances of the warm pool that are replaced at the end."""
    total: int = 0
    """Number of instances to replace at the start."""
    checkpoint: int = 0
    """Number of checkpoints reached."""
    paused_until_s: float = 0.0
    moved_s: float = 0.0
    """When the refresh last made progress."""


@dataclass(slots=True)
class Asg:
    """Saved state of one Auto Scaling group."""

    config: GroupConfig
    created_s: float
    tags: dict[str, Tag] = field(default_factory=dict)
    hooks: dict[str, LifecycleHook] = field(default_factory=dict)
    suspended: dict[Process, str] = field(default_factory=dict)
    """Suspended processes with AWS's SuspensionReason."""
    policies: dict[str, ScalingPolicy] = field(default_factory=dict)
    alarms: dict[str, Alarm] = field(default_factory=dict)
    scheduled: dict[str, ScheduledAction] = field(default_factory=dict)
    due_s: dict[str, float] = field(default_factory=dict)
    """When each scheduled action runs next."""
    refreshes: list[InstanceRefresh] = field(default_factory=list)
    """Ended refreshes, newest first."""
    rolling: Rolling | None = None
    warm_pool: WarmPool | None = None
    deleting: bool = False
    cause: str = ""
    """Reason of the desired capacity in AWS's wording, until the capacity is reached."""
    replacing: list[str] = field(default_factory=list)
    """Reasons of the next launches, one for each lost instance."""
    cooling: int = 0
    """Seconds of cooldown that start once the activities in progress have ended."""
    cooled_s: float = 0.0
    """When the current cooldown ends."""
    barren_s: dict[str, float] = field(default_factory=dict)
    """Capacity pools (`type/zone/market`) without capacity, and until when to avoid them."""
