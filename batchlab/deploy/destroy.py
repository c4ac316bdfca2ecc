"""Command `batchlab deploy destroy`, which deletes a stack.

Invariant: data is deleted only with the user's explicit consent. `Destroy.run` returns the resources that remain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import BackendError, Refused, Unreachable
from batchlab.core.text import count
from batchlab.deploy import leftovers, status
from batchlab.deploy.account import Missing, aws_errors
from batchlab.deploy.apply import Interface, StackFailed, follow_operation
from batchlab.deploy.leftovers import AwsResource
from batchlab.deploy.stack import Stack
from batchlab.deploy.stack_records import Resource, State

MAX_PROTECTION_CALL = 50
"""Maximum number of instances in one call of SetInstanceProtection."""
MAX_DRAIN_S = 600.0
"""Maximum time in seconds until all instances have ended. A worker finishes or returns its tasks within two minutes."""

SNAPSHOT = "AWS::RDS::DBSnapshot"
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
class DataResource:
    """Resource of a stack that contains data of the user. `what` describes the data.

    `fate` is the effect of the stack's deletion on the resource: "deleted", "kept", or "snapshot". The deletion of a
    database with the fate "snapshot" creates a last snapshot.
    """

    resource: Resource
    fate: str
    what: str

    @property
    def text(self) -> str:
        return f"{self.resource.physical} ({self.what})"


def data_resources(stack: Stack) -> list[DataResource]:
    """Return the resources of the stack that contain data of the user."""
    declared = stack.template()["Resources"]
    resources = []
    for resource in stack.resources():
        if resource.status == "CREATE_FAILED":
            # If CloudFormation could not create the resource, an existing resource with its name belongs to another
            # owner.
            continue
        policy = declared.get(resource.id, {}).get("DeletionPolicy", "")
        # Without a DeletionPolicy, CloudFormation takes a snapshot of a database before its deletion, and deletes all
        # other resources.
        usual = "Snapshot" if resource.type == _DATABASE else "Delete"
        fate = _FATES.get(policy or usual, "deleted")
        if resource.type == _BUCKET and leftovers.has_data(stack.account, resource.physical):
            resources.append(DataResource(resource, fate, "objects"))
        elif resource.type == _DATABASE:
            resources.append(DataResource(resource, fate, "a PostgreSQL database"))
        elif resource.type == _DOMAIN:
            resources.append(DataResource(resource, fate, "a SimpleDB domain"))
    return resources


@dataclass(slots=True)
class Destroy:
    """One run of `batchlab deploy destroy`. `delete_data` permits the deletion of all data of the stack."""

    stack: Stack
    interface: Interface
    delete_data: bool
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> list[Resource] | None:
        """Destroy the stack. Return the resources that remain, or None if the user declined the deletion.

        Raise Refused if the deletion would delete data and `delete_data` is false. Raise StackFailed if CloudFormation
        fails, and BackendError if AWS refuses a call.
        """
        state = follow_operation(self.stack, self.interface)
        if state is None:
            raise Refused(
                f"The stack {self.stack.name} does not exist in {self.stack.account.region}.",
                remedy="Name another stack or region with `--stack` and `--region`.",
            )
        if state.status == "DELETE_COMPLETE":
            return []
        data = [] if state.is_new else data_resources(self.stack)
        lost = ", ".join(item.text for item in data if item.fate == "deleted")
        if lost and not self.delete_data:
            raise Refused(
                f"The data of the stack {state.name} would be deleted: {lost}.",
                remedy="Download what you need, then use --delete-data.",
            )
        if not self.interface.agrees(self._question(state, data)):
            return None
        if state.is_protected:
            self.stack.protect(on=False)
        if not state.is_new:
            self._end_instances(state)
            self._release_databases(data)
            self._empty_buckets(data)
        remaining = [*self._delete(state), *self._snapshots(data)]
        self._delete_logs(data)
        return remaining

    def _question(self, state: State, data: list[DataResource]) -> str:
        if self.delete_data:
            texts = ", ".join(item.text for item in data) or "no data"
            return f"Destroy the stack {state.name}, and with it {texts}?"
        remaining = ", ".join(
            f"{item.resource.physical} {'remains' if item.fate == 'kept' else 'leaves a last snapshot'}"
            for item in data
            if item.fate != "deleted"
        )
        return f"Destroy the stack {state.name}{f' ({remaining})' if remaining else ''}?"

    def _end_instances(self, state: State) -> None:
        """End all instances before the deletion of the stack.

        During the deletion of the stack, a running manager would launch and protect instances, and a running worker
        would write into a bucket that is being emptied. CloudFormation cannot delete a group with a protected instance.
        """
        names = [resource.physical for resource in self.stack.resources() if resource.type == _GROUP]
        if not names:
            return
        # The manager must end before the workers, because a manager sets the capacity of the workers' groups.
        workers = status.pool_groups(state)
        for manager_only in (True, False):
            groups = [
                group for group in self.stack.account.groups(names) if not manager_only or _name(group) not in workers
            ]
            for group in groups:
                self._to_zero(group)
            self._wait_for_end([_name(group) for group in groups])

    def _to_zero(self, group: Mapping[str, Any]) -> None:
        with aws_errors(f"Auto Scaling group {_name(group)!r}"):
            self.stack.account.client("autoscaling").update_auto_scaling_group(
                AutoScalingGroupName=_name(group), MinSize=0, DesiredCapacity=0
            )

    def _wait_for_end(self, names: list[str]) -> None:
        deadline_s = time.monotonic() + MAX_DRAIN_S
        reported = 0
        while True:
            groups = self.stack.account.groups(names)
            remaining = sum(len(_instances(group)) for group in groups)
            if not remaining:
                return
            if remaining != reported:
                reported = remaining
                self.interface.say(f"{count(remaining, 'instance')} {'is' if remaining == 1 else 'are'} terminating.")
            for group in groups:
                if self._unprotect(group):
                    # The Auto Scaling group may have given up the termination of instances that were protected, so set
                    # the group's capacity to 0 again.
                    self._to_zero(group)
            if time.monotonic() > deadline_s:
                raise Unreachable(
                    f"Instances of {', '.join(names)} have not ended within {MAX_DRAIN_S:.0f} s.",
                    remedy="Check the groups' activities in the console, then destroy the stack again.",
                )
            self.sleep(2.0)

    def _unprotect(self, group: Mapping[str, Any]) -> bool:
        """Remove the scale-in protection of all instances of the group. Return whether an instance was protected."""
        scaling = self.stack.account.client("autoscaling")
        guarded = [instance["InstanceId"] for instance in _instances(group) if instance["ProtectedFromScaleIn"]]
        for begin in range(0, len(guarded), MAX_PROTECTION_CALL):
            with aws_errors(f"Auto Scaling group {_name(group)!r}"):
                scaling.set_instance_protection(
                    AutoScalingGroupName=_name(group),
                    InstanceIds=guarded[begin : begin + MAX_PROTECTION_CALL],
                    ProtectedFromScaleIn=False,
                )
        return bool(guarded)

    def _release_databases(self, data: list[DataResource]) -> None:
        """Turn off the deletion protection of databases. CloudFormation cannot delete a protected database."""
        rds = self.stack.account.client("rds")
        for item in data:
            if item.resource.type != _DATABASE or item.fate == "kept":
                continue
            name = item.resource.physical
            # A missing database is not an error, because the user may have deleted the database, and CloudFormation
            # ignores a missing database.
            with (
                suppress(Missing),
                aws_errors(f"Database {name!r}", lambda code, _: code.startswith("DBInstanceNotFound")),
            ):
                (database,) = rds.describe_db_instances(DBInstanceIdentifier=name)["DBInstances"]
                if database.get("DeletionProtection"):
                    rds.modify_db_instance(DBInstanceIdentifier=name, DeletionProtection=False, ApplyImmediately=True)

    def _empty_buckets(self, data: list[DataResource]) -> None:
        """Empty the buckets of the stack, because CloudFormation cannot delete other buckets. Without `delete_data`,
        buckets with data of the user are not emptied.
        """
        kept = [] if self.delete_data else [item.resource for item in data]
        for resource in self.stack.resources():
            if resource.type == _BUCKET and resource not in kept and resource.status != "CREATE_FAILED":
                leftovers.empty(self.stack.account, resource.physical, self.interface.say)

    def _delete(self, state: State) -> list[Resource]:
        before = self.stack.resources()
        since = self.stack.mark(state.id)
        self.stack.delete(state.id)
        if state.is_new:
            return []
        with self.interface.watching("deleting", len(before)) as on_event:
            ended = self.stack.follow(state.id, since, on_event)
        events = self.stack.events(state.id, since)
        if ended.status != "DELETE_COMPLETE":
            raise StackFailed(ended, self.stack.cause(state.id, events))
        skipped = {event.resource for event in events if event.status == "DELETE_SKIPPED"}
        return [resource for resource in before if resource.id in skipped and not self._remove(resource)]

    def _snapshots(self, data: list[DataResource]) -> Iterator[Resource]:
        """Yield the snapshots that were taken of the stack's databases before their deletion."""
        for item in data:
            if item.fate != "snapshot":
                continue
            query = {"DBInstanceIdentifier": item.resource.physical, "SnapshotType": "manual"}
            for snapshot in self.stack.account.pages("rds", "describe_db_snapshots", "DBSnapshots", **query):
                name, status = snapshot["DBSnapshotIdentifier"], snapshot["Status"]
                yield Resource(item.resource.id, SNAPSHOT, name, status)

    def _delete_logs(self, data: list[DataResource]) -> None:
        """Delete the log groups that RDS creates again for its last messages, after CloudFormation has deleted the
        stack's own log groups.
        """
        account = self.stack.account
        for item in data:
            if item.resource.type != _DATABASE or item.fate == "kept":
                continue
            prefix = f"/aws/rds/instance/{item.resource.physical}/"
            try:
                for group in account.pages("logs", "describe_log_groups", "logGroups", logGroupNamePrefix=prefix):
                    name = group["logGroupName"]
                    logs = AwsResource(name, "logs:log-group", name, self.stack.name)
                    leftovers.remove(account, logs, self.interface.say)
            except BackendError as error:
                # Remaining logs are not an error, because the stack is already deleted.
                self.interface.say(f"Logs below {prefix} may remain: {error}")

    def _remove(self, resource: Resource) -> bool:
        """Remove a resource that CloudFormation kept during the stack's deletion. Return whether the resource was
        removed.

        Without `delete_data`, the function removes only a bucket without data of the user.
        """
        kind = _KINDS.get(resource.type)
        name, account = resource.physical, self.stack.account
        is_wanted = self.delete_data or (resource.type == _BUCKET and not leftovers.has_data(account, name))
        if kind is None or not is_wanted:
            return False
        leftovers.remove(account, AwsResource(name, kind, name, self.stack.name), self.interface.say)
        return True


def _name(group: Mapping[str, Any]) -> str:
    return str(group["AutoScalingGroupName"])


def _instances(group: Mapping[str, Any]) -> list[Any]:
    return list(group.get("Instances") or ())
