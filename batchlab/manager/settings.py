"""The manager's time constants; a backend names them in its descriptor.

Invariant: importing them imports nothing else of the manager, since workers read descriptors too.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 3
"""Bundles per slot kept outstanding: one runs, one is prefetched, one covers the manager's own
latency. A shallow queue lets sizes follow measurements and priorities take effect."""


@dataclass(frozen=True, slots=True)
class ManagerSettings:
    """Seconds throughout.

    `control_lease_s` is the workers' (see WorkerSettings). A bundle that is planned, uncommitted
    and silent for `silence_s` is looked for and sent again. `lease_ttl_s` is the leader's.
    `tick_s` paces the autoscaler, the reconciler and the fleet. `drain_target_s`, `cooldown_in_s`
    and `idle_s` belong to the scaling policy (see autoscaler). After `boot_tries` instances of a
    pool in a row that did not come up, the next is tried after `boot_pause_s`, 0 where the fleet
    slows itself down (see boots). `boot_tries`, `max_receives` and `window` (bundles per slot) are
    numbers.
    """

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
