"""Notification settings of a grid (`notify.toml`): its targets, and the limits for targets of jobs.

Invariant: unless the operator permits it, a job cannot send a message to the manager's own machine,
and its messages are not signed. Origins are compared as a whole: scheme, host, and port. A path is
never compared, because clients, proxies, and servers read paths differently.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from urllib.parse import urlsplit

from batchlab.core.job_definition import NotifyDef
from batchlab.core.notifications import NAMED, Target, is_loopback, own_target

FILE = "notify.toml"
PORTS = {"https": 443, "http": 80}
"""Default port of each scheme."""


def origin(url: str) -> str:
    """Return scheme, host, and port of a URL in normal form.

    Raise ValueError if the URL lacks a scheme or a host.
    """
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme not in PORTS or not host:
        raise ValueError("it has no scheme and host")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        shown = host.lower()
    else:
        shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{parts.scheme}://{shown}:{parts.port or PORTS[parts.scheme]}"


@dataclass(frozen=True, slots=True)
class Directory:
    """Notification settings that the operator of a grid wrote.

    `local` are origins on the manager's machine that webhooks of jobs may call. `secrets` maps the
    variable with a secret to the origins whose job webhooks may be signed with this secret.
    """

    targets: tuple[Target, ...] = ()
    local: frozenset[str] = frozenset()
    secrets: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))

    def named(self, name: str) -> Target | None:
        """Return the grid's own target with that name."""
        return next((one for one in self.targets if one.name == name), None)

    def own(self, job: str, number: int, one: NotifyDef) -> Target:
        """Return the job's target number `number`, with the grid's settings applied.

        A target that `refusal` refuses stays as the job defined it.
        """
        said = own_target(job, number, one)
        if one.kind != NAMED:
            return replace(said, local=_where(one) in self.local)
        found = self.named(one.to)
        if found is None or not found.jobs:
            return said
        # The operator chose the address of this target, so it may be on the manager's machine.
        return replace(said, kind=found.kind, to=found.to, secret=found.secret, local=True)

    def refusal(self, one: NotifyDef) -> str:
        """Return the reason why the grid does not use a job's target, or "" if it does.

        `notifications.problem` has checked the target before.
        """
        if one.kind == NAMED:
            return self._of_named(one.to)
        if one.kind != "webhook":
            return ""
        where = _where(one)
        if where and is_loopback(urlsplit(one.to).hostname or "") and where not in self.local:
            return (
                f"{where} is the manager's own machine, where no job has anything sent to unless "
                f"the grid's operator names it as `local` below [jobs] of {FILE}."
            )
        name = one.secret.partition(":")[2]
        if name and where not in self.secrets.get(name, ()):
            return (
                f"{name} may not sign what jobs have sent to {where}, unless the grid's operator "
                f"names that beside it below [jobs.secrets] of {FILE}."
            )
        return ""

    def _of_named(self, name: str) -> str:
        found = self.named(name)
        if found is not None and found.jobs:
            return ""
        names = ", ".join(one.name for one in self.targets if one.jobs) or "none"
        return (
            f"The grid has no target {name!r} that jobs may name; it has {names}. One is there for "
            f"jobs where {FILE} says jobs = true of it."
        )


def _where(one: NotifyDef) -> str:
    """Return the origin of the target's address, or "" if it has none."""
    try:
        return origin(one.to)
    except ValueError:
        return ""  # it is a topic, or an address that is refused because it is not a URL
