"""External data of a group: launch templates, metrics, and prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from batchlab.core.model import Machine, Market
from batchlab.fleet.api_types import LaunchTemplate, ScalingPolicy


@dataclass(frozen=True, slots=True)
class Template:
    """The data of a launch template version that a launch needs. The launcher gets `slots`,
    `boot_s`, and `env` in its Pool."""

    reference: LaunchTemplate
    """The id, the name, and the number of the version."""
    instance_type: str = ""
    market: Market = Market.ON_DEMAND
    slots: int = 1
    boot_s: float = 0.0
    env: tuple[tuple[str, str], ...] = ()


class Templates(Protocol):
    """Store of launch templates. Every launch reads it, so `$Latest` is the latest version."""

    def template(self, reference: LaunchTemplate) -> Template:
        """Return the referenced version. Raise ValidationError if it does not exist."""

    def launch_configuration(self, name: str) -> Template:
        """Return a launch configuration as a template. Raise ValidationError if it is missing."""


@runtime_checkable
class Resting(Protocol):
    """A launcher that can stop and restart instances.

    `Launcher.running` includes stopped instances, because they have not ended. `terminate` ends
    them too.
    """

    async def stop(self, instance: str, *, hibernate: bool) -> None:
        """Stop an instance, and return when it has stopped. `hibernate` keeps its memory."""

    async def start(self, instance: str) -> None:
        """Start a stopped instance, and return when it runs."""


class Metrics(Protocol):
    """Source of the metrics of target-tracking policies."""

    def value(self, policy: ScalingPolicy) -> float | None:
        """Return the newest value, or None without data."""


class Prices(Protocol):
    """Prices of instances, for the allocation strategy `lowest-price`."""

    def hourly(self, machine: Machine) -> float | None:
        """Return the dollars per hour. If it is None, the order of the overrides decides."""
