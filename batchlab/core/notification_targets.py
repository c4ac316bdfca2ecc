"""Whom a grid tells, and what it lets the targets of jobs do: what `notify.toml` says, as values.

Invariant: unless the operator says so, no job has anything sent to the manager's own machine, and
none has anything signed. Origins are compared whole: scheme, host and port, and never a part of a
path, which clients, proxies and servers each read in their own way.
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
"""What a URL means that names no port, by its scheme."""


def origin(url: str) -> str:
    """Scheme, host and port of a URL, written in one way; ValueError where it has none."""
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
    """What the operator of a grid has written down.

    `local` are origins on the manager's machine that webhooks of jobs may lead to, `secrets` the
    origins whose webhooks of jobs may be signed, by the variable that the secret is in.
    """

    targets: tuple[Target, ...] = ()
    local: frozenset[str] = frozenset()
    secrets: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))

    def named(self, name: str) -> Target | None:
        """One of the grid's own targets."""
        return next((one for one in self.targets if one.name == name), None)

    def own(self, job: str, number: int, one: NotifyDef) -> Target:
        """The job's target number `number`, as the grid has it; one that `refusal` finds fault with
        stays what the job has said."""
        said = own_target(job, number, one)
        if one.kind != NAMED:
            return replace(said, local=_where(one) in self.local)
        found = self.named(one.to)
        if found is None or not found.jobs:
            return said
        # Where it leads is the operator's word, so it may lead to where the operator likes.
        return replace(said, kind=found.kind, to=found.to, secret=found.secret, local=True)

    def refusal(self, one: NotifyDef) -> str:
        """Why a grid does not tell a job's target, as a sentence; "" where it does. What
        `notification.problem` finds is found already."""
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
    """The origin that it leads to, "" where it leads to none."""
    try:
        return origin(one.to)
    except ValueError:
        return ""  # a topic, or what is refused as no URL at all
