"""What a group of AWS's kind has beyond a plain pool's: configuration, hooks, policies, progress.

All of it is saved. Moments ending in `_s` are those of the SteadyClock.
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
    """A target-tracking policy's two alarms: since when the metric has been above and below."""

    above_since_s: float | None = None
    below_since_s: float | None = None
    acted_s: float | None = None
    """When the policy last changed desired capacity; it looks again a period later."""


@dataclass(slots=True)
class Rolling:
    """An instance refresh under way."""

    refresh: InstanceRefresh
    warmup: int
    """Seconds in service after which a new instance counts as ready."""
    old: set[str] = field(default_factory=set)
    """Instances still to be replaced."""
    before: set[str] = field(default_factory=set)
    """All that the group had when it began, so that a rollback knows the new ones."""
    warm: set[str] = field(default_factory=set)
    """Instances of the warm pool that are replaced at the end."""
    total: int = 0
    """How many there were to replace."""
    checkpoint: int = 0
    """Checkpoints reached so far."""
    paused_until_s: float = 0.0
    moved_s: float = 0.0
    """When it last made progress."""


@dataclass(slots=True)
class Asg:
    """One group's own state."""

    config: GroupConfig
    created_s: float
    tags: dict[str, Tag] = field(default_factory=dict)
    hooks: dict[str, LifecycleHook] = field(default_factory=dict)
    suspended: dict[Process, str] = field(default_factory=dict)
    """With AWS's SuspensionReason."""
    policies: dict[str, ScalingPolicy] = field(default_factory=dict)
    alarms: dict[str, Alarm] = field(default_factory=dict)
    scheduled: dict[str, ScheduledAction] = field(default_factory=dict)
    due_s: dict[str, float] = field(default_factory=dict)
    """When each scheduled action is to run next."""
    refreshes: list[InstanceRefresh] = field(default_factory=list)
    """Those that have ended, newest first."""
    rolling: Rolling | None = None
    warm_pool: WarmPool | None = None
    deleting: bool = False
    cause: str = ""
    """The sentence of AWS's that says why desired capacity is what it is, until it is reached."""
    replacing: list[str] = field(default_factory=list)
    """Sentences for the next launches, each in response to one loss."""
    cooling: int = 0
    """Seconds of cooldown that begin once the activities under way have ended."""
    cooled_s: float = 0.0
    """When the cooldown that runs is over."""
    barren_s: dict[str, float] = field(default_factory=dict)
    """Capacity pools (`type/zone/market`) that had no capacity, and until when to avoid them."""
