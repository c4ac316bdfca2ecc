"""What is told of a job, to whom, and when: targets, moments, and the message itself.

Invariants: a notification's id is derived from what it tells and to whom, so telling it again is
the same notification; what a job names may be a web address or a topic, and never a command. No
secret is in any of these values, only the name of where one is.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from batchlab.core.errors import BatchlabError
from batchlab.core.job_definition import JobDef, NotifyDef
from batchlab.core.model import Json
from batchlab.core.ports import JobRecord, StageRecord
from batchlab.core.protocol import json_format
from batchlab.core.protocol.field_checks import known

ENDS = ("succeeded", "failed", "cancelled")
MOMENTS = ("ended", *ENDS, "failures", "stuck", "capped")
"""`ended` is any of the three ends. `failures`: so many tasks have failed; `stuck`: nothing has
moved for so long; `capped`: a cap on cost holds the job back."""
KINDS = ("webhook", "sns", "command")
MOST_TARGETS = 10
"""Of one job."""
NAMED = "target"
"""The kind of a job's target that names one of the grid's own."""
LONGEST_URL = 2000
SECRET_PREFIX = "BATCHLAB_NOTIFY_"  # noqa: S105 - what the names of variables begin with
"""A job may name no other variables of the manager's environment: those are for other things."""
TOPIC = re.compile(r"arn:aws[a-z-]*:sns:([a-z0-9-]+):\d{12}:[A-Za-z0-9_-]{1,250}(\.fifo)?")
TARGET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_JOB_ENV = re.compile(rf"env:{SECRET_PREFIX}[A-Za-z0-9_]+")
_FILE = re.compile(r"file:/.+")


class NotDelivered(BatchlabError):
    """A notification did not reach its target; `final` says that no other try will."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True, slots=True)
class Target:
    """Somebody who is told. `name` is one of the grid's own, or says whose job's it is; `to` is
    empty for a `command`. The other fields are as in NotifyDef."""

    name: str
    kind: str
    to: str = ""
    command: tuple[str, ...] = ()
    on: tuple[str, ...] = ("ended",)
    secret: str = ""
    failures: int = 1
    stuck_s: float = 600.0
    job: str = ""
    """Whose it is, "" where it is the grid's."""
    jobs: bool = False
    """Of the grid's: jobs may name it."""
    local: bool = False
    """Of a job's: it may lead to the manager's own machine."""

    @property
    def stays_out(self) -> bool:
        """Whether nothing of it may reach the manager's own machine."""
        return bool(self.job) and not self.local

    @property
    def shown(self) -> str:
        """Where it leads, without what may be a secret: the path of a web address often is."""
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
    """A message on its way, or what came of it. `body` is JSON; times are seconds of the epoch.

    `target` is a name of the grid's, or the job's own definition, which outlives the job's memory.
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
    """What came of the last try, "" where that was good, or there was none."""
    state: str = "pending"
    """Then "delivered", or "given up"."""
    ended_s: float | None = None


def targets_of(job: JobDef) -> list[Target]:
    """Whom the job itself names."""
    return [own_target(job.id, number, one) for number, one in enumerate(job.notify, start=1)]


def own_target(job: str, number: int, one: NotifyDef) -> Target:
    return Target(
        f"{job}#{number}",
        one.kind,
        one.to,
        (),
        one.on,
        one.secret,
        one.failures,
        one.stuck_s,
        job,
    )


def derived_id(target: Target, job: str, round_: int, moment: str, key: str = "") -> str:
    """The id of what is told at one moment of a job; `key` tells apart moments that come again."""
    whole = "\0".join((target.name, target.to, *target.command, job, str(round_), moment, key))
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def made(
    target: Target,
    job: JobDef,
    round_: int,
    moment: str,
    body: Mapping[str, Json],
    *,
    at_s: float,
    key: str = "",
) -> Notification:
    """A notification of this moment."""
    id_ = derived_id(target, job.id, round_, moment, key)
    text = json_format.dumps(
        {"v": json_format.VERSION, "id": id_, "moment": moment, "at_s": at_s, **body}
    )
    own = job.notify[int(target.name.rpartition("#")[2]) - 1] if target.job else None
    return Notification(id_, moment, job.id, target.name, own, text, at_s)


def body_of(record: JobRecord, stages: Sequence[StageRecord], **more: Json) -> dict[str, Json]:
    """What is told of a job."""
    counts = [one.counts for one in stages]
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
            "planned": sum(one.planned or 0 for one in counts),
            "succeeded": sum(one.succeeded for one in counts),
            "failed": sum(one.failed for one in counts),
            "cancelled": sum(one.cancelled for one in counts),
        },
        **more,
    }


# --- What may be a target ------------------------------------------------------------------------


def problem(one: NotifyDef) -> str:
    """What is wrong with a target that a job names, as a sentence; "" where nothing is."""
    if one.kind == NAMED:
        if one.secret:
            return "A target of the grid's own signs by its own secret, so a job names none."
        named = TARGET_NAME.fullmatch(one.to)
        wrong = "" if named else "No target of a grid's own can have that name."
        return wrong or _figures(one.on, one.failures, one.stuck_s)
    if one.kind not in ("webhook", "sns"):
        return f"A job cannot notify by {one.kind!r}: only the grid's own settings name commands."
    if one.secret and (one.kind != "webhook" or not _JOB_ENV.fullmatch(one.secret)):
        return (
            "The secret of a job's webhook is named as env:"
            f"{SECRET_PREFIX}…, a variable of the manager's environment."
        )
    return address_problem(one.kind, one.to) or _figures(one.on, one.failures, one.stuck_s)


def target_problem(target: Target) -> str:
    """The same of one of the grid's own."""
    if target.kind == "command":
        if not target.command or not all(target.command):
            return "A command is a list of a program and its arguments."
    elif wrong := address_problem(target.kind, target.to):
        return wrong
    secret = target.secret
    if secret and not (_ENV.fullmatch(secret) or _FILE.fullmatch(secret)):
        return "A secret is named as env:NAME or file:/PATH, and is never written here itself."
    if target.jobs and target.kind == "command":
        return "Jobs may not name a command: say jobs = true of a webhook or a topic."
    # One that is there for jobs alone need not be told of every job.
    return _figures(
        target.on or (("ended",) if target.jobs else ()), target.failures, target.stuck_s
    )


def address_problem(kind: str, to: str) -> str:
    """What is wrong with a web address or a topic, before anybody has looked it up."""
    if kind == "sns":
        fits = TOPIC.fullmatch(to)
        return "" if fits else "A topic is named by its ARN, such as arn:aws:sns:REGION:ID:NAME."
    try:
        parts = urlsplit(to)
        parts.port  # noqa: B018 - raises where it is none
    except ValueError:
        return "The webhook's address is no URL."
    # In ASCII, as URLs are: what is not must be percent-encoded or in punycode.
    if not to.isascii() or not to.isprintable() or " " in to or not parts.hostname:
        return "The webhook's address is no URL."
    if len(to) > LONGEST_URL:
        return "The webhook's address is no URL."
    if parts.username is not None or parts.password is not None:
        return "The webhook's address may hold no user and password: sign it with a secret."
    if parts.scheme not in ("https", "http"):
        return "A webhook is called by https, or by http on this machine."
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        return "A webhook is called by https; http is only for this machine itself."
    try:
        return address_refusal(parts.hostname)
    except ValueError:
        return ""  # a name, which is looked up when it is called


def is_loopback(host: str) -> bool:
    """Whether a host, as it is written, is this machine."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower() == "localhost"
    return any(one.is_loopback for one in (found, *_within(found)))


_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "fd00:ec2::23", "100.100.100.200"),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
_COMPATIBLE = ipaddress.ip_network("::/96")


def address_refusal(address: str) -> str:
    """Why nothing is sent to an IP address, "" where something may be; ValueError for a name."""
    found = ipaddress.ip_address(address.partition("%")[0])
    for one in (found, *_within(found)):
        if one in _METADATA or one.is_link_local:
            return f"{address} is a link-local or metadata address, to which nothing is sent."
        if one.is_multicast or one.is_unspecified:
            return f"{address} is no address of one machine, so nothing is sent to it."
    return ""


def _within(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses that an IPv6 one leads to, or may lead to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    whole = int(address)
    # `::` and `::1` are no IPv4 addresses, but what they are anyway.
    if address in _NAT64 or (address in _COMPATIBLE and whole > 1):
        found.append(_low(whole))
    if address in _LOCAL_NAT64:
        # Its prefix may have four lengths, and bits 64 to 71 are passed over (RFC 6052).
        joined = (whole >> 64 << 56) | (whole & (1 << 56) - 1)
        found += [_low(whole), *(_low(joined >> shift) for shift in (40, 32, 24))]
    return [one for one in found if one is not None]


def _low(number: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(number & 0xFFFFFFFF)


def _figures(on: Sequence[str], failures: int, stuck_s: float) -> str:
    if not on or any(one not in MOMENTS for one in on):
        return f"The moments are {', '.join(MOMENTS)}."
    if failures < 1 or not 1 <= stuck_s < float("inf"):
        return "The failures and seconds after which somebody is told begin with 1."
    return ""


# --- As it is kept -------------------------------------------------------------------------------


def to_json(one: Notification) -> dict[str, Json]:
    doc = json_format.fields(one)
    doc["own"] = json_format.fields(one.own) if one.own else None
    return doc


def from_json(doc: Mapping[str, Any]) -> Notification:
    """What a later batchlab has added is passed over: else all that waits beside it was lost."""
    own = doc["own"]
    kept = NotifyDef(**{**known(NotifyDef, own), "on": tuple(own["on"])}) if own else None
    return replace(Notification(**{**known(Notification, doc), "own": None}), own=kept)
