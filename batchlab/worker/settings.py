"""The worker's time constants; a backend names them in its descriptor."""

from __future__ import annotations

from dataclasses import dataclass

from batchlab.core.ports import MAX_VISIBILITY_S


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Seconds throughout.

    `visibility_s` is extended at a third of it. `control_lease_s` is how long a worker may start
    tasks of a job after it last looked at the job's control object; a cancellation is acknowledged
    after that long. `beat_s` is the longest silence towards the manager while something is in
    hand, `idle_beat_s` while nothing is; `beat_gap_s` the least time between two beats. `drain_s`
    is what a draining worker gives its running tasks. `hand_over_s` after the receive a running
    bundle is handed over to a watchdog message, before SQS's cap of 12 h takes the receipt away;
    the watchdog comes back every `watchdog_s`. Bundles that end within `quick_s` are prefetched,
    one per slot: a longer one would keep the prefetched message from an idle worker.
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
        """How often a handed-over bundle's running marker is refreshed."""
        return self.watchdog_s / 6

    @property
    def marker_stale_s(self) -> float:
        """A marker older than this says that its worker is gone. Well above clock skew."""
        return self.watchdog_s / 2
