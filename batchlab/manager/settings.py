"""The manager's time constants. A backend names them in its descriptor.

Invariant: this module imports nothing else of the manager, because workers read descriptors too.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 3
"""Outstanding bundles per slot: one runs, one is prefetched, and one covers the manager's latency.
A shallow queue lets bundle sizes follow measurements and lets priorities take effect."""


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """All durations are seconds. `control_lease_s` belongs to the workers (see WorkerSettings). The
    reconciler looks for a planned, uncommitted bundle that was silent for `silence_s`, and sends it
    again. `lease_ttl_s` is the leader's lease. `tick_s` paces the autoscaler, the reconciler, and
    the fleet. `drain_target_s`, `cooldown_in_s`, and `idle_s` belong to the scaling policy. After
    `boot_tries` consecutive failed launches in a pool, the next launch waits for `boot_pause_s` (0
    if the fleet slows down by itself; see LaunchBreaker). `boot_tries`, `max_receives`, and
    `window` (bundles per slot) are numbers."""

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
