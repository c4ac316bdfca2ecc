"""What forecasts take from runs that were measured, as plain values.

Alone in its file, since every backend's descriptor has one: each worker's start reads it, and needs
nothing else of a scenario.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a simulated grid takes from runs that were measured on `backend`.

    `boot_s` is from launch to InService by pool, `other_boot_s` that of pools which are not named
    there; where it is None they boot as long as the scenario says. `call_s` are the least and the
    most that a port call takes. `bundle_s` is what a bundle takes beyond its tasks and what it
    computes (below), `submit_s` from a job's submission until its first bundle can be received,
    `end_s` from its last task's end to its own. `stretch` is measured over declared task time, by
    "template/stage". `manager_s` is from when a manager is started, in place of one that has died,
    until it stands for the lead. `bundle_cpu_s` is what all processes of the grid compute for a
    bundle, where they share `cores`; with 0 cores that is no matter.
    """

    backend: str
    boot_s: Mapping[str, float] = field(default_factory=dict)
    call_s: tuple[float, float] = (0.002, 0.020)
    bundle_s: float = 0.0
    submit_s: float = 0.0
    end_s: float = 0.0
    stretch: Mapping[str, float] = field(default_factory=dict)
    other_boot_s: float | None = None
    manager_s: float = 3.0
    bundle_cpu_s: float = 0.0
    cores: int = 0
    runs: int = 0
    """How many records it was made of."""
    compressed: float = 1.0
    """What the times of those runs had been divided by."""
