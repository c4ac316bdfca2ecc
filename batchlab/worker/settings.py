"""Time settings of a worker, which a backend sets in its descriptor."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.ports import MAX_VISIBILITY_S


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Time settings in seconds.

    - `visibility_s`: visibility timeout of messages, extended after each third of it.
    - `control_lease_s`: how long tasks of a job may start after a read of its control object. A
      cancellation is acknowledged after this time.
    - `beat_s`, `idle_beat_s`: longest time between heartbeats, with and without in-flight messages.
    - `beat_gap_s`: shortest time between two heartbeats.
    - `wait_s`: long-poll time of a receive.
    - `drain_s`: time that a draining worker gives its running tasks.
    - `hand_over_s`: age at which a watchdog message replaces the message of a running bundle,
      because SQS limits the visibility to 12 h.
    - `watchdog_s`: delay of each watchdog message.
    - `quick_s`: if bundles end within this time, one further bundle per slot is prefetched. Behind
      a longer bundle, a prefetched message would be kept from an idle worker.
    """

    visibility_s: float = 30.0
    control_lease_s: float = 1.0
    beat_s: float = 10.0
    idle_beat_s: float = 60.0
    beat_gap_s: float = 0.5
    wait_s: float = 20.0
    drain_s: float = 20.0
    hand_over_s: float = MAX_VISIBILITY_S * 0.9
    watchdog_s: float = 900.0
    quick_s: float = 1.5

    @property
    def marker_s(self) -> float:
        """Seconds between two refreshes of the running marker of a handed-over bundle."""
        return self.watchdog_s / 6

    @property
    def marker_stale_s(self) -> float:
        """Age in seconds of a marker whose worker counts as dead, well above clock skew."""
        return self.watchdog_s / 2
