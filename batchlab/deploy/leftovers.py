"""What stacks have left behind in an account and region, by AWS's tags and by names.

Invariant: a tag says whose something is, and a name only makes one think so: what is known by its
name alone is removed by whoever names it, and by nothing else.
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
"""As CloudFormation calls the domain of a stack."""
_DATABASE_LOG = re.compile(rf"/aws/rds/instance/(?P<database>{_STACK}-ledger)/(postgresql|upgrade)")
"""As RDS calls what the database of a stack logs."""


@dataclass(frozen=True, slots=True)
class Left:
    """Something of a stack's. `is_used` while its stack is there and has it; `is_guessed` where its
    name alone says whose it is."""

    thing: Thing
    is_used: bool
    is_guessed: bool = False


class Leftovers:
    """Looks through one account in one region; each stack is asked for once."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._parts: dict[str, list[str] | None] = {}

    def tagged(self) -> Iterator[Left]:
        """Everything that has the tag of a stack of batchlab's, by AWS's own list of tagged
        resources. IAM's roles are not in it, nor what can have no tags."""
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
        """What is called as if it were a stack's, and has no tag: SimpleDB's domains, which can
        have none, and logs of a database that is gone. `known` are the names of `tagged`. `say`
        hears of what could not be asked for."""
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
            # Somebody may call a database so whom no stack of ours has heard of.
            if match["database"] not in living:
                name = one["logGroupName"]
                yield Thing(str(one.get("arn", name)), "logs:log-group", name, match["stack"])

    def _parts_of(self, name: str) -> list[str] | None:
        """The physical ids of what the stack has, None where there is no such stack."""
        if name not in self._parts:
            stack = Stack(self._account, name)
            is_there = bool(name) and stack.state() is not None
            self._parts[name] = [one.physical for one in stack.resources()] if is_there else None
        return self._parts[name]


def chosen(found: Sequence[Left], names: Sequence[str]) -> list[Left]:
    """What is removed where somebody says so, `names` being those that they have named; NotFound or
    Refused for one of these that is not left behind."""
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
    # What groups launch, and what is taken of a disk or database, is nobody's part.
    if thing.kind in ("ec2:instance", "ec2:volume", "ec2:network-interface", "rds:snapshot"):
        return thing.kind != "rds:snapshot"
    return any(part in (thing.arn, thing.name) or part.endswith(f"/{thing.name}") for part in owned)


def remove_left(account: Account, left: Left, say: removal.Say) -> str:
    """ "" once it is removed, else why it is not."""
    try:
        removal.remove(account, left.thing, say)
    except BackendError as error:
        return error.message
    return ""
