"""Settings of the manager and of workers, which the descriptor of a backend contains.

Every command reads the descriptor of its backend, so this module imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_VISIBILITY_S = 43_200.0
"""Longest visibility timeout of a message in seconds, counted from the receive. SQS has the same limit."""

WINDOW = 3
"""Number of outstanding bundles per slot: one bundle runs, one bundle is prefetched, and one bundle covers the
manager's latency. A short queue lets bundle sizes follow new measurements, and lets job priorities take effect soon."""


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """Settings of the manager: time constants in seconds, and three numbers. `control_lease_s` is also a setting of the
    workers (see WorkerSettings). The reconciler recovers a bundle after `silence_s` without a heartbeat. `lease_ttl_s`
    is the time to live of the leader's lease. `tick_s` is the interval of the autoscaler, the reconciler, and the
    fleet. The scaling policy uses `drain_target_s`, `cooldown_in_s`, and `idle_s`. After `boot_tries` consecutive
    failed launches in a pool, the next launch waits for `boot_pause_s` (0 for a fleet with its own backoff; see
    LaunchBreaker). A bundle gets a speculative copy only after it has run for `copy_after_s`. A scheduled action of
    each group ends the fleet after `orphan_s` without a leading manager (0: never; see FleetEnd). `boot_tries`,
    `max_receives`, and `window` (bundles per slot) are numbers without a unit."""

    control_lease_s: float = 1.0
    visibility_s: float = 30.0
    silence_s: float = 90.0
    lease_ttl_s: float = 10.0
    tick_s: float = 1.0
    wait_s: float = 20.0
    drain_target_s: float = 2.0
    cooldown_in_s: float = 10.0
    idle_s: float = 5.0
    boot_tries: int = 3
    boot_pause_s: float = 0.0
    max_receives: int = 10
    window: int = WINDOW
    copy_after_s: float = 5.0
    orphan_s: float = 0.0


VALUE_CACHE_BYTES = 8 * 1024**3


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Settings of a worker, with times in seconds. The descriptor of a backend sets the settings of its workers."""

    visibility_s: float = 30.0
    """Visibility timeout of messages, which the worker extends (see `visibility_timeouts`)."""
    control_lease_s: float = 1.0
    """Time after a read of a job's control object in which tasks of the job may start.

    The manager acknowledges a cancellation one control lease after the cancellation.
    """
    beat_s: float = 10.0
    """Longest time between heartbeats of a worker with in-flight messages."""
    idle_beat_s: float = 60.0
    """Longest time between heartbeats of a worker without in-flight messages."""
    beat_gap_s: float = 0.5
    """Shortest time between two heartbeats."""
    wait_s: float = 20.0
    """Long-poll time of a receive."""
    drain_s: float = 20.0
    """Time that a draining worker gives its running tasks."""
    hand_over_s: float = 0.9 * MAX_VISIBILITY_S
    """Age at which a watchdog message replaces the message of a running bundle.

    SQS limits the visibility of a message to 12 h.
    """
    watchdog_s: float = 900.0
    """Delay of each watchdog message."""
    quick_s: float = 1.5
    """Maximum duration of bundles for which the worker prefetches one further bundle per slot.

    A prefetched message behind a longer bundle would be withheld from idle workers.
    """
    value_cache_bytes: int = VALUE_CACHE_BYTES
    """Maximum size of the values of `Grid.put` that an instance stores on its disk.

    The values that were used least recently are removed first. The value that was used last always stays.
    """

    @property
    def marker_s(self) -> float:
        """Seconds between two refreshes of the running marker of a handed-over bundle."""
        return self.watchdog_s / 6

    @property
    def marker_stale_s(self) -> float:
        """Age in seconds of a running marker at which its worker counts as dead.

        The age limit of a marker is well above the clock skew between machines.
        """
        return self.watchdog_s / 2
