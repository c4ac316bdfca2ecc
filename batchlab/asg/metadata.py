"""What the engine knows of an instance, told where its metadata service asks for it."""

from __future__ import annotations

from dataclasses import replace

from batchlab.adapters.imds_server import MetadataSource
from batchlab.adapters.imds_tree import Interruption, Metadata, Signals
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.fleet.faults import ValidationError


class Facts:
    """A group's word on its instances; the engine comes to it once its launcher is there."""

    engine: AutoScaling

    def signals(self, instance: str) -> Signals:
        """What the instance's future is; of one that no group knows, that it will end."""
        try:
            known = self.engine.metadata(instance)
        except ValidationError:
            return Signals("Terminated")
        interruption = None
        if known.spot_action and known.spot_time is not None:
            interruption = Interruption(known.spot_time, known.spot_action)
        return Signals(known.target_lifecycle_state, interruption, known.rebalance_time)

    def of(self, launcher: object) -> MetadataSource:
        """The launcher's own metadata with the group's tags; nothing where it has none."""
        return _Tagged(self, launcher)


class _Tagged:
    def __init__(self, facts: Facts, launcher: object) -> None:
        self._facts = facts
        self._launcher = launcher

    async def metadata(self, address: str) -> Metadata | None:
        """As the port says."""
        ask = getattr(self._launcher, "metadata", None)
        found: Metadata | None = await ask(address) if ask else None
        if found is None:
            return None
        try:
            known = self._facts.engine.metadata(found.instance)
        except ValidationError:
            return found
        return replace(found, tags={**found.tags, **dict(known.tags)})
