"""Deletion of a stack.

Invariant: data is deleted only with the user's explicit consent. Resources that remain are listed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.deploy import leftovers, status
from batchlab.deploy.account import Missing, asked
from batchlab.deploy.apply import Front, StackFailed
from batchlab.deploy.leftovers import Thing
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Resource, State

BATCH = 50
"""Maximum of SetInstanceProtection."""
QUIET_S = 600.0
"""Seconds that the instances of all groups may take to end. They drain for at most two minutes."""

_BUCKET, _DATABASE, _DOMAIN = "AWS::S3::Bucket", "AWS::RDS::DBInstance", "AWS::SDB::Domain"
_GROUP = "AWS::AutoScaling::AutoScalingGroup"
_KINDS = {
    _BUCKET: "s3:bucket",
    _DOMAIN: "sdb:domain",
    "AWS::Logs::LogGroup": "logs:log-group",
    "AWS::SecretsManager::Secret": "secretsmanager:secret",
}
_FATES = {"Retain": "kept", "RetainExceptOnCreate": "kept", "Snapshot": "snapshot"}


@dataclass(frozen=True, slots=True)
class Holding:
    """A resource of a stack that holds data, and its fate in CloudFormation: "deleted", "kept", or
    "snapshot" for a database that leaves a last snapshot."""

    resource: Resource
    fate: str
    what: str


def holdings(stack: Stack) -> list[Holding]:
    """Return the resources of the stack that hold data now."""
    declared = stack.template()["Resources"]
    found = []
    for resource in stack.resources():
        if resource.status == "CREATE_FAILED":
            continue  # A resource with this name belongs to another owner.
        policy = declared.get(resource.id, {}).get("DeletionPolicy", "")
        # CloudFormation's default is a snapshot for databases, and deletion for all else.
        usual = "Snapshot" if resource.type == _DATABASE else "Delete"
        fate = _FATES.get(policy or usual, "deleted")
        if resource.type == _BUCKET and leftovers.has_data(stack.account, resource.physical):
            found.append(Holding(resource, fate, "objects"))
        elif resource.type == _DATABASE:
            found.append(Holding(resource, fate, "a PostgreSQL database"))
        elif resource.type == _DOMAIN:
            found.append(Holding(resource, fate, "a SimpleDB domain"))
    return found


@dataclass(slots=True)
class Destroy:
    """One run of `destroy`. With `delete_data` it also deletes the data."""

    stack: Stack
    front: Front
    delete_data: bool
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> list[Resource] | None:
        """Destroy the stack, and return the resources that remain, or None if the user declined.
        Raises Refused if data would be lost without `delete_data`, StackFailed, and
        BackendError."""
        state = self.stack.state()
        if state is None:
            raise Refused(
                f"The stack {self.stack.name} does not exist in {self.stack.account.region}.",
                remedy="`--stack` and `--region` name another.",
            )
        if state.is_moving:
            self.front.say(f"The stack {state.name} is {state.status}: following that first.")
            since, _ = self.stack.last_operation(state.id)
            with self.front.watching(state.status, 0) as see:
                state = self.stack.follow(state.id, since, see)
            if state.status == "DELETE_COMPLETE":
                return []
        held = [] if state.is_new else holdings(self.stack)
        self._check(state, held)
        if not self.front.agrees(self._question(state, held)):
            return None
        if state.is_protected:
            self.stack.protect(on=False)
        if not state.is_new:
            self._quiet(state)
            self._release_databases(held)
            self._emptied(held)
        stays = [*self._deleted(state), *self._snapshots(held)]
        self._forget_logs(held)
        return stays

    def _check(self, state: State, held: list[Holding]) -> None:
        lost = [holding for holding in held if holding.fate == "deleted"]
        if lost and not self.delete_data:
            named = ", ".join(f"{holding.resource.physical} ({holding.what})" for holding in lost)
            raise Refused(
                f"With the stack {state.name} its data would go: {named}.",
                remedy="Fetch what you need, then say --delete-data.",
            )

    def _question(self, state: State, held: list[Holding]) -> str:
        if not self.delete_data:
            holdings = [holding for holding in held if holding.fate != "deleted"]
            stays = ", ".join(
                f"{holding.resource.physical} " + ("stays" if holding.fate == "kept" else "leaves a last snapshot")
                for holding in holdings
            )
            return f"Destroy the stack {state.name}{f' ({stays})' if stays else ''}?"
        gone = ", ".join(f"{holding.resource.physical} ({holding.what})" for holding in held) or "no data"
        return f"Destroy the stack {state.name}, and with it {gone}?"

    def _quiet(self, state: State) -> None:
        """End all instances. A manager would launch and protect others, a worker would write into a
        bucket that is being emptied, and a protected instance would keep its group."""
        names = [resource.physical for resource in self.stack.resources() if resource.type == _GROUP]
        if not names:
            return
        # The manager ends first, because it sets the capacity of the other groups.
        workers = status.pool_groups(state)
        managers = [one for one in self._groups(names) if _name(one) not in workers]
        for some in (managers, self._groups(names)):
            for group in some:
                self._to_zero(group)
            self._wait_for_end([_name(one) for one in some])

    def _to_zero(self, group: Mapping[str, Any]) -> None:
        with asked(f"Auto Scaling group {_name(group)!r}"):
            self.stack.account.client("autoscaling").update_auto_scaling_group(
                AutoScalingGroupName=_name(group), MinSize=0, DesiredCapacity=0
            )

    def _wait_for_end(self, names: list[str]) -> None:
        give_up_s = time.monotonic() + QUIET_S
        said = 0
        while True:
            groups = self._groups(names)
            left = sum(len(_instances(group)) for group in groups)
            if not left:
                return
            if left != said:
                said = left
                self.front.say(f"{left} instances are ending.")
            for group in groups:
                if self._unprotected(group):
                    # The group may have given up on its instances because they were protected.
                    self._to_zero(group)
            if time.monotonic() > give_up_s:
                raise Unreachable(
                    f"Instances of {', '.join(names)} have not ended in {QUIET_S:.0f} s.",
                    remedy="Look at the groups' activities in the console, then destroy again.",
                )
            self.sleep(2.0)

    def _unprotected(self, group: Mapping[str, Any]) -> bool:
        """Remove the scale-in protection of instances. Return whether any was protected."""
        scaling = self.stack.account.client("autoscaling")
        guarded = [instance["InstanceId"] for instance in _instances(group) if instance["ProtectedFromScaleIn"]]
        for begin in range(0, len(guarded), BATCH):
            with asked(f"Auto Scaling group {_name(group)!r}"):
                scaling.set_instance_protection(
                    AutoScalingGroupName=_name(group),
                    InstanceIds=guarded[begin : begin + BATCH],
                    ProtectedFromScaleIn=False,
                )
        return bool(guarded)

    def _groups(self, names: list[str]) -> list[Any]:
        if not names:
            return []
        told = self.stack.account.pages(
            "autoscaling", "describe_auto_scaling_groups", "AutoScalingGroups", AutoScalingGroupNames=names
        )
        return list(told)

    def _release_databases(self, held: list[Holding]) -> None:
        """Turn off the deletion protection of databases, without which CloudFormation cannot delete them."""
        rds = self.stack.account.client("rds")
        for holding in held:
            if holding.resource.type != _DATABASE or holding.fate == "kept":
                continue
            name = holding.resource.physical
            with suppress(Missing), asked(f"Database {name!r}", _is_gone):
                (told,) = rds.describe_db_instances(DBInstanceIdentifier=name)["DBInstances"]
                if told.get("DeletionProtection"):
                    rds.modify_db_instance(DBInstanceIdentifier=name, DeletionProtection=False, ApplyImmediately=True)

    def _emptied(self, held: list[Holding]) -> None:
        """Empty the buckets that CloudFormation must delete. A bucket with nothing but releases holds no data."""
        resources = [] if self.delete_data else [holding.resource for holding in held]
        for resource in self.stack.resources():
            if resource.type == _BUCKET and resource not in resources and resource.status != "CREATE_FAILED":
                leftovers.empty(self.stack.account, resource.physical, self.front.say)

    def _deleted(self, state: State) -> list[Resource]:
        before = self.stack.resources()
        since = self.stack.mark(state.id)
        self.stack.delete(state.id)
        if state.is_new:
            return []
        with self.front.watching("deleting", len(before)) as see:
            ended = self.stack.follow(state.id, since, see)
        events = self.stack.events(state.id, since)
        if ended.status != "DELETE_COMPLETE":
            raise StackFailed(ended, self.stack.cause(state.id, events))
        skipped = {event.resource for event in events if event.status == "DELETE_SKIPPED"}
        stays = [resource for resource in before if resource.id in skipped]
        return [stay for stay in stays if not self._removed(stay)]

    def _snapshots(self, held: list[Holding]) -> Iterator[Resource]:
        """Yield the last snapshots of deleted databases."""
        for holding in held:
            if holding.fate != "snapshot":
                continue
            for told in self.stack.account.pages(
                "rds",
                "describe_db_snapshots",
                "DBSnapshots",
                DBInstanceIdentifier=holding.resource.physical,
                SnapshotType="manual",
            ):
                name = told["DBSnapshotIdentifier"]
                yield Resource(holding.resource.id, "AWS::RDS::DBSnapshot", name, told["Status"])

    def _forget_logs(self, held: list[Holding]) -> None:
        """Delete the log groups that RDS created again for its last messages, after the stack's own were deleted."""
        account = self.stack.account
        for holding in held:
            if holding.resource.type != _DATABASE or holding.fate == "kept":
                continue
            prefix = f"/aws/rds/instance/{holding.resource.physical}/"
            try:
                for told in account.pages("logs", "describe_log_groups", "logGroups", logGroupNamePrefix=prefix):
                    name = told["logGroupName"]
                    thing = Thing(name, "logs:log-group", name, self.stack.name)
                    leftovers.remove(account, thing, self.front.say)
            except BackendError as error:
                # The stack is deleted in any case.
                self.front.say(f"There may be logs left below {prefix}: {error}")

    def _removed(self, resource: Resource) -> bool:
        """Remove a resource that CloudFormation has kept, if the user asked for that or if it is a
        bucket without data. Return whether it was removed."""
        kind = _KINDS.get(resource.type)
        if kind is None:
            return False
        if not self.delete_data and (
            resource.type != _BUCKET or leftovers.has_data(self.stack.account, resource.physical)
        ):
            return False
        name = resource.physical
        leftovers.remove(self.stack.account, Thing(name, kind, name, self.stack.name), self.front.say)
        return True


def _is_gone(code: str, _message: str) -> bool:
    """Return whether the database does not exist, because a user deleted it. CloudFormation ignores that."""
    return code.startswith("DBInstanceNotFound")


def _name(group: Mapping[str, Any]) -> str:
    return str(group["AutoScalingGroupName"])


def _instances(group: Mapping[str, Any]) -> list[Any]:
    return list(group.get("Instances") or ())
