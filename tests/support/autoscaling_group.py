"""An Auto Scaling group with a launcher in memory and a clock that a test sets, for the tests of
AWS's Auto Scaling rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchlab.adapters.memory.launcher import MemoryState
from batchlab.core.errors import BackendError
from batchlab.core.model import Instance, LifecycleState, Machine, Market, Pool
from batchlab.core.ports import ANY_MACHINE
from batchlab.fleet.api_types import (
    LAUNCHING,
    ActivityDetails,
    GroupConfig,
    GroupDetails,
    InstanceDetails,
    LaunchTemplate,
    LifecycleHook,
    ScalingPolicy,
    Template,
    ValidationError,
)
from batchlab.fleet.autoscaling import AutoScaling
from tests.support.fleet import CountedIds, ManualClock, TableLauncher, checked_in

GROUP = "g"
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
TEMPLATE = LaunchTemplate("", "workers", "1")
CONFIG = GroupConfig(GROUP, min_size=0, max_size=10, launch_template=TEMPLATE, availability_zones=ZONES)


@dataclass
class TemplateTable:
    """Launch templates by name and version."""

    table: dict[tuple[str, int], Template] = field(default_factory=dict)

    def put(self, version: int = 1, *, name: str = "workers", **facts: Any) -> None:
        reference = LaunchTemplate("lt-" + str(len(name)), name, str(version))
        self.table[name, version] = Template(reference, **facts)

    def template(self, reference: LaunchTemplate) -> Template:
        versions = [version for name, version in self.table if name == self._name(reference)]
        if not versions:
            raise ValidationError("The specified launch template does not exist.")
        if reference.version in ("", "$Latest", "$Default"):
            version = max(versions) if reference.version == "$Latest" else min(versions)
        else:
            version = int(reference.version)
        return self.table[self._name(reference), version]

    def launch_configuration(self, name: str) -> Template:
        if not name.startswith("lc"):
            raise ValidationError(f"Launch configuration name not found - {name}")
        return Template(LaunchTemplate(), "old.large")

    def _name(self, reference: LaunchTemplate) -> str:
        return reference.launch_template_name or "workers"


@dataclass
class MachineLauncher(TableLauncher):
    """A TableLauncher that records the machine of each instance and can lack capacity for some machines."""

    machines: dict[str, Machine] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    exhausted: set[tuple[str, str]] = field(default_factory=set)
    """The (type, zone) pairs without capacity."""

    async def launch(self, pool: Pool, instance: str, machine: Machine = ANY_MACHINE) -> None:
        if (machine.type, machine.zone) in self.exhausted:
            raise BackendError(f"We currently do not have sufficient {machine.type} capacity.")
        self.machines[instance], self.pools[instance] = machine, pool
        await super().launch(pool, instance, machine)


@dataclass
class PutMetrics:
    """The metrics of scaling policies by name. A stored metric value is valid for five minutes."""

    clock: ManualClock
    put_: dict[str, tuple[float, float]] = field(default_factory=dict)

    def put(self, policy: str, value: float) -> None:
        self.put_[policy] = value, self.clock.time_s

    def value(self, policy: ScalingPolicy) -> float | None:
        value, put_s = self.put_.get(policy.policy_name, (0.0, float("-inf")))
        return value if self.clock.time_s - put_s <= 300.0 else None


@dataclass
class World:
    """The Auto Scaling service and its dependencies. `restart` simulates a crash of the service's process."""

    launcher: MachineLauncher = field(default_factory=MachineLauncher)
    clock: ManualClock = field(default_factory=ManualClock)
    ids: CountedIds = field(default_factory=CountedIds)
    store: MemoryState = field(default_factory=MemoryState)
    templates: TemplateTable = field(default_factory=TemplateTable)
    options: dict[str, Any] = field(default_factory=dict)
    metrics: PutMetrics = field(init=False)
    asg: AutoScaling = field(init=False)

    def __post_init__(self) -> None:
        self.templates.put(1, instance_type="m.large")
        self.metrics = PutMetrics(self.clock)
        self.restart()

    def restart(self) -> None:
        self.asg = AutoScaling(
            self.launcher,
            self.clock,
            self.ids,
            self.store,
            templates=self.templates,
            shortest_lifetime_s=60,
            **{"metrics": self.metrics, **self.options},
        )

    async def tick(self, after_s: float = 0.0, *, times: int = 1) -> list[Instance]:
        dead: list[Instance] = []
        for _ in range(times):
            self.clock.time_s += after_s
            dead += await self.asg.tick()
        return dead

    async def group(self, size: int = 0, config: GroupConfig = CONFIG, **options: Any) -> list[str]:
        """Create the group, wait until the group is stable, and return the ids of its instances."""
        self.asg.create_auto_scaling_group(config, desired_capacity=size, **options)
        await self.tick(times=3)
        return self.ids_in(LifecycleState.IN_SERVICE)

    async def resize(self, size: int) -> None:
        self.asg.set_desired_capacity(GROUP, size)
        await self.tick(times=3)

    def view(self, name: str = GROUP) -> GroupDetails:
        (group,) = self.asg.describe_auto_scaling_groups([name])
        return group

    def instances(self) -> Sequence[InstanceDetails]:
        return self.view().instances

    def one(self, instance: str) -> InstanceDetails:
        (found,) = self.asg.describe_auto_scaling_instances([instance])
        return found

    def ids_in(self, *states: LifecycleState) -> list[str]:
        return [i.instance_id for i in self.instances() if i.lifecycle_state in states]

    def states(self) -> list[str]:
        return [str(i.lifecycle_state) for i in self.instances()]

    def zones(self) -> list[str]:
        """Return the last letter of the zone of each instance in service, sorted."""
        return sorted(i.availability_zone[-1] for i in self.instances() if i.lifecycle_state == "InService")

    def machines(self) -> list[tuple[str, Market]]:
        return [(i.instance_type, i.market) for i in self.instances()]

    def activities(self) -> Sequence[ActivityDetails]:
        return self.asg.describe_scaling_activities(GROUP)

    def causes(self) -> Mapping[str, str]:
        return {activity.description: activity.cause for activity in self.activities()}


def hook(name: str = "boot", transition: str = LAUNCHING, **facts: Any) -> LifecycleHook:
    return LifecycleHook(GROUP, name, transition, **facts)


in_aws = checked_in(World)
"""Turn an async check of a World into a test."""
