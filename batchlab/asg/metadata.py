"""What the engine knows of an instance, told where its metadata service asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from batchlab.adapters.imds_server import MetadataSource
from batchlab.adapters.imds_tree import Interruption, Metadata, Signals, iso
from batchlab.asg.templates import Role, TemplateFile
from batchlab.fleet.autoscaling import AutoScaling
from batchlab.fleet.faults import ValidationError
from batchlab.ports import Clock

CREDENTIALS_S = 6 * 3600.0
"""How long a role's credentials are said to be good for, as EC2's are."""


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

    def of(self, launcher: object, templates: TemplateFile, clock: Clock) -> MetadataSource:
        """The launcher's own metadata with the group's tags, and the user data and credentials of
        the launch template; nothing where it has none."""
        return _Told(self, launcher, templates, clock)


class _Told:
    def __init__(
        self, facts: Facts, launcher: object, templates: TemplateFile, clock: Clock
    ) -> None:
        self._facts = facts
        self._launcher = launcher
        self._templates = templates
        self._clock = clock

    async def metadata(self, address: str) -> Metadata | None:
        """As the port says."""
        ask = getattr(self._launcher, "metadata", None)
        found: Metadata | None = await ask(address) if ask else None
        if found is None:
            return None
        try:
            known = self._facts.engine.metadata(found.instance)
            (row,) = self._facts.engine.describe_auto_scaling_instances([found.instance])
            found = replace(found, tags={**found.tags, **dict(known.tags)})
            if row.launch_template is None:
                return found
            version = self._templates.referred(row.launch_template)
        except (ValidationError, ValueError):
            return found  # it has just gone, or its template has
        credentials = {}
        if role := version.role:
            credentials[role.name] = _document(role, self._clock.now_s())
        return replace(found, user_data=version.user_data, credentials=credentials)


def _document(role: Role, now_s: float) -> Mapping[str, str]:
    """Credentials as the metadata service tells them."""
    return {
        "Code": "Success",
        "LastUpdated": iso(now_s),
        "Type": "AWS-HMAC",
        "AccessKeyId": role.access_key,
        "SecretAccessKey": role.secret_key,
        "Token": role.token,
        "Expiration": iso(now_s + CREDENTIALS_S),
    }
