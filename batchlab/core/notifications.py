"""Notifications about events of jobs, and the notification settings of a grid.

Invariants: the id of a notification is derived from its event and its target, so a repeated notification has the same
id. The targets of a job are web addresses or topics, and only the operator of a grid can configure a command. Targets
and notifications never contain a secret, only the name of the variable or the file that contains the secret.

The file `notify.toml` has the notification settings: the grid's targets, and the limits for targets of jobs. Without a
permission in the settings, the targets of a job cannot be on the manager's own machine, and messages to the targets of
a job are not signed. Origins are compared as a whole: scheme, host, and port. The paths of addresses are never
compared, because clients, proxies, and servers read paths differently.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from batchlab.core.errors import BatchlabError
from batchlab.core.job_definition import JobDef, NotifyDef
from batchlab.core.model import Json
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.protocol import json_format
from batchlab.core.protocol.field_checks import MAX_COUNT, MAX_S, decode

ENDS = ("succeeded", "failed", "cancelled")
MOMENTS = ("ended", *ENDS, "failures", "stuck", "capped")
"""Events of a job about which notifications are sent (called moments).

`ended` means that the job has reached any of its three final states. `failures` means that the number of failed tasks
has reached a limit. `stuck` means that the job has not made progress for some time. `capped` means that the job waits
because of a cap on cost.
"""
KINDS = ("webhook", "sns", "command")
MAX_TARGETS = 10
"""Maximum number of targets of one job."""
NAMED = "target"
"""Kind of a job's target that refers to one of the grid's own targets by name."""
MAX_URL_CHARACTERS = 2000
SECRET_PREFIX = "BATCHLAB_NOTIFY_"  # noqa: S105 - prefix of the names of variables
"""Prefix of the names of the manager's environment variables that a job may name.

A job cannot name an environment variable of the manager without the prefix SECRET_PREFIX.
"""
TOPIC = re.compile(r"arn:aws[a-z-]*:sns:([a-z0-9-]+):\d{12}:[A-Za-z0-9_-]{1,250}(\.fifo)?")
TARGET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_JOB_ENV = re.compile(rf"env:{SECRET_PREFIX}[A-Za-z0-9_]+")
_FILE = re.compile(r"file:/.+")


class NotDelivered(BatchlabError):
    """Error for a notification that was not delivered. `final` is true if another attempt cannot succeed."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True, slots=True)
class Target:
    """A receiver of notifications.

    `name` is the name of a target of the grid. For a target of a job, `name` consists of the id of the job and the
    target's number. `to` is empty for a `command`. The other fields of a Target have the same meaning as in NotifyDef.
    """

    name: str
    kind: str
    to: str = ""
    command: tuple[str, ...] = ()
    on: tuple[str, ...] = ("ended",)
    secret: str = ""
    failures: int = 1
    stuck_s: float = 600.0
    job: str = ""
    """Id of the job that the target belongs to, or "" for a target of the grid."""
    jobs: bool = False
    """Whether jobs may use this target of the grid."""
    local: bool = False
    """Whether this target of a job may be on the manager's own machine."""

    @property
    def stays_out(self) -> bool:
        """Return whether the target must not be on the manager's own machine."""
        return bool(self.job) and not self.local

    @property
    def shown(self) -> str:
        """Return the target's address without parts that may be secret, such as the path of a web address."""
        if self.kind == "command":
            return self.command[0]
        if self.kind in ("sns", NAMED):
            return self.to
        parts = urlsplit(self.to)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/…"

    def wants(self, moment: str) -> bool:
        return moment in self.on or (moment in ENDS and "ended" in self.on)


@dataclass(frozen=True, slots=True)
class Notification:
    """A pending or finished notification. `body` is JSON, and all times are epoch seconds.

    `target` is the name of a target. For a target of a job, `own` is the target's definition, because the manager may
    remove the job from memory before it sends the notification.
    """

    id: str
    moment: str
    job: str
    target: str
    own: NotifyDef | None
    body: str
    at_s: float
    attempts: int = 0
    due_s: float = 0.0
    error: str = ""
    """Error of the last attempt to deliver the notification, or "" if the last attempt succeeded or no attempt was
    made.
    """
    state: str = "pending"
    """State of the notification, which is first "pending", and later "delivered" or "given up"."""
    ended_s: float | None = None


def targets_of(job: JobDef) -> list[Target]:
    """Return the targets that the job itself defines."""
    return [own_target(job.id, number, notify_def) for number, notify_def in enumerate(job.notify, start=1)]


def own_target(job: str, number: int, notify_def: NotifyDef) -> Target:
    n = notify_def
    return Target(f"{job}#{number}", n.kind, n.to, (), n.on, n.secret, n.failures, n.stuck_s, job)


def derive_id(target: Target, job: str, round_: int, moment: str, key: str = "") -> str:
    """Return the id of a notification, derived from its target, job, round, and event (`moment`).

    `key` distinguishes notifications about repeated events of a job.
    """
    whole = "\0".join((target.name, target.to, *target.command, job, str(round_), moment, key))
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def make_notification(
    target: Target, job: JobDef, round_: int, moment: str, body: Mapping[str, Json], *, at_s: float, key: str = ""
) -> Notification:
    """Return a new notification about an event of a job."""
    id_ = derive_id(target, job.id, round_, moment, key)
    text = json_format.dumps({"v": json_format.VERSION, "id": id_, "moment": moment, "at_s": at_s, **body})
    own = job.notify[int(target.name.rpartition("#")[2]) - 1] if target.job else None
    return Notification(id_, moment, job.id, target.name, own, text, at_s)


def body_of(record: JobRecord, stages: Sequence[StageRecord], **more: Json) -> dict[str, Json]:
    """Return the content of a notification about a job."""
    counts = [stage.counts for stage in stages]
    job = record.job
    return {
        "job": {
            "id": job.id,
            "name": job.name,
            "state": record.state.value,
            "reason": record.reason,
            "round": record.round,
            "tags": dict(job.tags),
            "submitted_s": job.submitted_s,
            "ended_s": record.ended_s,
        },
        "tasks": {
            "planned": sum(count.planned or 0 for count in counts),
            "succeeded": sum(count.succeeded for count in counts),
            "failed": sum(count.failed for count in counts),
            "cancelled": sum(count.cancelled for count in counts),
        },
        **more,
    }


# --- Validation of targets ------------------------------------------------------------------------


def problem(target: NotifyDef) -> str:
    """Return the error in the definition of a job's target as a sentence, or "" if the target is valid."""
    if target.kind == NAMED:
        if target.secret:
            return "A target of the grid uses its own secret, so a job must not name a secret for it."
        match = TARGET_NAME.fullmatch(target.to)
        wrong = "" if match else "A target of the grid cannot have this name."
        return wrong or _figures(target.on, target.failures, target.stuck_s)
    if target.kind not in ("webhook", "sns"):
        what = f"A job cannot use notifications of the kind {target.kind!r}."
        return f"{what} Only the settings of the grid may define commands."
    if target.secret and (target.kind != "webhook" or not _JOB_ENV.fullmatch(target.secret)):
        return f"Write env:{SECRET_PREFIX}… for the secret of a job's webhook: a variable of the manager's environment."
    return address_problem(target.kind, target.to) or _figures(target.on, target.failures, target.stuck_s)


def target_problem(target: Target) -> str:
    """Return the error in the definition of a target of the grid as a sentence, or "" if the target is valid."""
    if target.kind == "command":
        if not target.command or not all(target.command):
            return "A command must be a list of a program and its arguments."
    elif wrong := address_problem(target.kind, target.to):
        return wrong
    secret = target.secret
    if secret and not (_ENV.fullmatch(secret) or _FILE.fullmatch(secret)):
        return "Write env:NAME or file:/PATH for a secret, never the secret itself."
    if target.jobs and target.kind == "command":
        return "Jobs may not use a command. Set jobs = true only for a webhook or a topic."
    # A target that only jobs use does not need its own list of events.
    return _figures(target.on or (("ended",) if target.jobs else ()), target.failures, target.stuck_s)


def address_problem(kind: str, to: str) -> str:
    """Return the error in a web address or a topic as a sentence, or "" if the address is valid, without a name
    lookup.
    """
    if kind == "sns":
        fits = TOPIC.fullmatch(to)
        return "" if fits else "Write the ARN of the topic, such as arn:aws:sns:REGION:ID:NAME."
    try:
        parts = urlsplit(to)
        parts.port  # noqa: B018 - the property raises ValueError if the port is not valid
    except ValueError:
        return "The webhook's address is not a URL."
    # URLs are ASCII, and all other characters must be percent-encoded or in punycode.
    if not to.isascii() or not to.isprintable() or " " in to or not parts.hostname:
        return "The webhook's address is not a URL."
    if len(to) > MAX_URL_CHARACTERS:
        return "The webhook's address is not a URL."
    if parts.username is not None or parts.password is not None:
        return "The webhook's address must not contain a user or a password. Sign the messages with a secret."
    if parts.scheme not in ("https", "http"):
        return "The address of a webhook must begin with https, or with http on this machine."
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        return "The address of a webhook must begin with https. Only addresses of this machine may begin with http."
    try:
        return address_refusal(parts.hostname)
    except ValueError:
        return ""  # a host name is resolved and checked when the webhook is called


def is_loopback(host: str) -> bool:
    """Return whether the text of a host denotes the local machine, without a name lookup."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower() == "localhost"
    return any(candidate.is_loopback for candidate in (address, *_within(address)))


_METADATA = frozenset(
    map(ipaddress.ip_address, ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "fd00:ec2::23", "100.100.100.200"))
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.ip_network("::/96")


def address_refusal(address: str) -> str:
    """Return the reason why notifications cannot be sent to an IP address, or "" if the address is permitted.

    Raise ValueError if `address` is a host name.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    for candidate in (parsed, *_within(parsed)):
        if candidate in _METADATA or candidate.is_link_local:
            return f"{address} is a link-local or metadata address. Notifications are never sent to such an address."
        if candidate.is_multicast or candidate.is_unspecified:
            return f"{address} is not the address of a single machine, so notifications are not sent to it."
    return ""


def _within(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that packets for an IPv6 address may reach."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    addresses = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    whole = int(address)
    # The addresses `::` and `::1` have a special meaning and do not contain an IPv4 address.
    if address in _NAT64 or (address in _COMPATIBLE and whole > 1):
        addresses.append(_low(whole))
    if address in _LOCAL_NAT64:
        # The NAT64 prefix may have one of four lengths, and bits 64 to 71 are skipped (RFC 6052).
        joined = (whole >> 64 << 56) | (whole & (1 << 56) - 1)
        addresses += [_low(whole), *(_low(joined >> shift) for shift in (40, 32, 24))]
    return [inner for inner in addresses if inner is not None]


def _low(number: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(number & 0xFFFFFFFF)


def _figures(on: Sequence[str], failures: int, stuck_s: float) -> str:
    if not on or any(moment not in MOMENTS for moment in on):
        return f"The moments are {', '.join(MOMENTS)}."
    if not 1 <= failures <= MAX_COUNT or not 1 <= stuck_s <= MAX_S:
        return f"The number of failures must be 1 to {MAX_COUNT}, and the seconds without progress 1 to {MAX_S:g}."
    return ""


# --- Stored format --------------------------------------------------------------------------------


def to_json(notification: Notification) -> dict[str, Json]:
    doc = json_format.fields(notification)
    doc["own"] = json_format.fields(notification.own) if notification.own else None
    return doc


def from_json(doc: Mapping[str, Any]) -> Notification:
    """Return the notification in a document, without fields that a later batchlab added.

    Unknown fields are ignored, because one unreadable notification would make the whole outbox unreadable.
    """
    return decode(Notification, doc)


FILE = "notify.toml"
PORTS = {"https": 443, "http": 80}
"""Default port of each scheme."""


def origin(url: str) -> str:
    """Return scheme, host, and port of a URL in normal form. Raise ValueError if the URL lacks a scheme or a host."""
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme not in PORTS or not host:
        raise ValueError("it does not have a scheme and a host")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        shown = host.lower()
    else:
        shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{parts.scheme}://{shown}:{parts.port or PORTS[parts.scheme]}"


@dataclass(frozen=True, slots=True)
class NotificationSettings:
    """Notification settings that the operator of a grid wrote.

    `local` are origins on the manager's machine that webhooks of jobs may call. `secrets` maps the name of a variable
    with a secret to origins. Messages to a job's webhook at one of the origins of a secret may be signed with the
    secret.
    """

    targets: tuple[Target, ...] = ()
    local: frozenset[str] = frozenset()
    secrets: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))

    def find_target(self, name: str) -> Target | None:
        """Return the grid's own target `name`, or None if the grid does not have the target."""
        return next((target for target in self.targets if target.name == name), None)

    def own(self, job: str, number: int, notify_def: NotifyDef) -> Target:
        """Return the job's target number `number`, with the grid's settings applied.

        A target that `refusal` refuses is returned as the job defined it.
        """
        said = own_target(job, number, notify_def)
        if notify_def.kind != NAMED:
            return replace(said, local=_where(notify_def) in self.local)
        target = self.find_target(notify_def.to)
        if target is None or not target.jobs:
            return said
        # The operator chose the address of a target of the grid, so the address may be on the manager's machine.
        return replace(said, kind=target.kind, to=target.to, secret=target.secret, local=True)

    def refusal(self, notify_def: NotifyDef) -> str:
        """Return the reason why the grid refuses a job's target, or "" if the target is permitted.

        The caller has checked the target with `notifications.problem` before.
        """
        if notify_def.kind == NAMED:
            return self._of_named(notify_def.to)
        if notify_def.kind != "webhook":
            return ""
        where = _where(notify_def)
        if where and is_loopback(urlsplit(notify_def.to).hostname or "") and where not in self.local:
            return (
                f"{where} is on the manager's own machine. Jobs may notify it only if the grid's "
                f"operator lists it as `local` under [jobs] in {FILE}."
            )
        name = notify_def.secret.partition(":")[2]
        if name and where not in self.secrets.get(name, ()):
            return (
                f"{name} may sign the notifications of jobs to {where} only if the grid's operator "
                f"lists this origin for it under [jobs.secrets] in {FILE}."
            )
        return ""

    def _of_named(self, name: str) -> str:
        found = self.find_target(name)
        if found is not None and found.jobs:
            return ""
        names = ", ".join(target.name for target in self.targets if target.jobs) or "none"
        return (
            f"The grid does not have a target {name!r} for jobs. Its targets for jobs: {names}. "
            f"Jobs may use a target if {FILE} sets jobs = true for it."
        )


def _where(notify_def: NotifyDef) -> str:
    """Return the origin of a target's address, or "" if the address does not have an origin."""
    try:
        return origin(notify_def.to)
    except ValueError:
        return ""  # `to` is a topic, or an address that is refused because the address is not a URL
