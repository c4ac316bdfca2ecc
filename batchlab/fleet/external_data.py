"""What a group is told from outside: launch templates, metrics, prices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from batchlab.core.model import Machine, Market
from batchlab.fleet.api_types import LaunchTemplate, ScalingPolicy


@dataclass(frozen=True, slots=True)
class Template:
    """A launch template's version, as far as a launch needs it. `slots`, `boot_s` and `env` are
    those of the Pool that the launcher is given."""

    reference: LaunchTemplate
    """Id, name and the number of the version."""
    instance_type: str = ""
    market: Market = Market.ON_DEMAND
    slots: int = 1
    boot_s: float = 0.0
    env: tuple[tuple[str, str], ...] = ()


class Templates(Protocol):
    """Where launch templates are kept; read at every launch, so that `$Latest` is the latest."""

    def template(self, reference: LaunchTemplate) -> Template:
        """The version that is referred to; ValidationError where there is none."""

    def launch_configuration(self, name: str) -> Template:
        """The launch configuration as a template; ValidationError where there is none."""


@runtime_checkable
class Resting(Protocol):
    """A launcher whose instances can be stopped and started again. A stopped one is still running
    as far as `Launcher.running` is concerned: it has not ended. `terminate` ends it as well."""

    async def stop(self, instance: str, *, hibernate: bool) -> None:
        """Stop it, with `hibernate` keeping its memory; returns when it has stopped."""

    async def start(self, instance: str) -> None:
        """Start it again; returns when it runs."""


class Metrics(Protocol):
    """Where the value of a target-tracking policy's metric comes from."""

    def value(self, policy: ScalingPolicy) -> float | None:
        """The newest value, None where there is no data."""


class Prices(Protocol):
    """What an instance costs; decides where a strategy is `lowest-price`."""

    def hourly(self, machine: Machine) -> float | None:
        """Dollars an hour, None where nobody knows (the order of the overrides then decides)."""
