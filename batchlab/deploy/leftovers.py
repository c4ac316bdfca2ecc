"""Leftovers of stacks in an account and region, found by AWS's tags and by names.

Invariant: a tag proves the owner of a resource, and a name only suggests it. So a resource known
only by its name is removed only if the user names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from batchlab.core.errors import BackendError, NotFound, Refused
from batchlab.deploy import removal
from batchlab.deploy.account import Account
from batchlab.deploy.plan import WITH_SIMPLEDB
from batchlab.deploy.removal import Thing, thing_of
from batchlab.deploy.stack import TAG, Stack

_STACK = r"(?P<stack>[A-Za-z][A-Za-z0-9-]*)"
_DOMAIN = re.compile(rf"{_STACK}-LedgerDomain-[0-9A-Za-z]+")
"""CloudFormation's name for the domain of a stack."""
_DATABASE_LOG = re.compile(rf"/aws/rds/instance/(?P<database>{_STACK}-ledger)/(postgresql|upgrade)")
"""RDS's name for the logs of a stack's database."""


@dataclass(frozen=True, slots=True)
class Left:
    """A resource of a stack. `is_used` if its stack exists and has it. `is_guessed` if only its
    name suggests its stack."""

    thing: Thing
    is_used: bool
    is_guessed: bool = False


class Leftovers:
    """Search of one account in one region. Each stack is read once."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._parts: dict[str, list[str] | None] = {}

    def tagged(self) -> Iterator[Left]:
        """Yield the resources with a batchlab stack's tag, from AWS's list of tagged resources. It
        does not contain IAM roles or resources that cannot have tags."""
        for one in self._account.pages(
            "resourcegroupstaggingapi",
            "get_resources",
            "ResourceTagMappingList",
            TagFilters=[{"Key": TAG}],
        ):
            tags = {tag["Key"]: tag["Value"] for tag in one.get("Tags", ())}
            thing = thing_of(one["ResourceARN"], tags.get(TAG, ""))
            if thing.kind != "cloudformation:stack":
                yield Left(thing, _is_used(thing, self._parts_of(thing.stack)))

    def named(self, known: Collection[str], say: Callable[[str], None]) -> Iterator[Left]:
        """Yield the resources without a tag whose names look like a stack's: SimpleDB domains,
        which cannot have tags, and logs of a deleted database. `known` are the names of `tagged`.
        `say` receives a message for each listing that fails."""
        for what, look in (("SimpleDB domains", self._domains), ("RDS's logs", self._logs)):
            try:
                found = [one for one in look() if one.name not in known]
            except BackendError as error:
                say(f"{what} are not listed: {error}")
                continue
            for one in found:
                yield Left(one, _is_used(one, self._parts_of(one.stack)), is_guessed=True)

    def _domains(self) -> Iterator[Thing]:
        if self._account.is_real and self._account.region not in WITH_SIMPLEDB:
            return
        for name in self._account.pages("sdb", "list_domains", "DomainNames"):
            if found := _DOMAIN.fullmatch(name):
                arn = f"{self._account.arn.format('sdb')}domain/{name}"
                yield Thing(arn, "sdb:domain", name, found["stack"])

    def _logs(self) -> Iterator[Thing]:
        groups = self._account.pages(
            "logs", "describe_log_groups", "logGroups", logGroupNamePrefix="/aws/rds/instance/"
        )
        named = [(one, _DATABASE_LOG.fullmatch(one["logGroupName"])) for one in groups]
        ours = [(one, match) for one, match in named if match]
        if not ours:
            return
        told = self._account.pages("rds", "describe_db_instances", "DBInstances")
        living = {one["DBInstanceIdentifier"] for one in told}
        for one, match in ours:
            # A database with such a name may exist outside batchlab's stacks.
            if match["database"] not in living:
                name = one["logGroupName"]
                yield Thing(str(one.get("arn", name)), "logs:log-group", name, match["stack"])

    def _parts_of(self, name: str) -> list[str] | None:
        """Return the physical ids of the stack's resources, or None if the stack does not exist."""
        if name not in self._parts:
            stack = Stack(self._account, name)
            is_there = bool(name) and stack.state() is not None
            self._parts[name] = [one.physical for one in stack.resources()] if is_there else None
        return self._parts[name]


def chosen(found: Sequence[Left], names: Sequence[str]) -> list[Left]:
    """Return the resources to remove. `names` are the user's choice of resources known only by
    name. Raises NotFound or Refused for a name that is not a leftover."""
    guessed: Mapping[str, Left] = {one.thing.name: one for one in found if one.is_guessed}
    for name in names:
        if name not in guessed:
            raise NotFound(
                f"Nothing is called {name} of what is known by its name alone.",
                remedy="`batchlab gc --aws` lists what there is; what has a tag needs no --name.",
            )
        if guessed[name].is_used:
            raise Refused(
                f"{name} is in use by the stack {guessed[name].thing.stack}.",
                remedy="`batchlab deploy destroy --delete-data` ends both.",
            )
    return [
        one for one in found if not one.is_used and (not one.is_guessed or one.thing.name in names)
    ]


def _is_used(thing: Thing, owned: list[str] | None) -> bool:
    if owned is None:
        return False
    # Instances, volumes, and network interfaces are not listed as resources of a stack. Snapshots
    # of databases outlive it.
    if thing.kind in ("ec2:instance", "ec2:volume", "ec2:network-interface", "rds:snapshot"):
        return thing.kind != "rds:snapshot"
    return any(part in (thing.arn, thing.name) or part.endswith(f"/{thing.name}") for part in owned)


def remove_left(account: Account, left: Left, say: removal.Say) -> str:
    """Remove a leftover. Return "" on success, else the error message."""
    try:
        removal.remove(account, left.thing, say)
    except BackendError as error:
        return error.message
    return ""
