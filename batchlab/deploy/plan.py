"""Plan of a stack, which shows changes and costs to the user before any change.

Invariant: if a plan is not executed, its change set, its empty new stack, and its temporary bucket are deleted.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from batchlab.core.errors import NotFound, UsageError
from batchlab.core.pricing import price_book
from batchlab.core.pricing.hourly import Hourly, StackShape, hourly_cost
from batchlab.deploy import checks, settings, template
from batchlab.deploy.account import Account, aws_errors
from batchlab.deploy.settings import BUSY, RELEASE, Settings, text_of
from batchlab.deploy.stack import TAG, Stack
from batchlab.deploy.stack_records import Change, ChangeSet, State
from batchlab.deploy.template import MAX_INLINE_BYTES, Template, render
from batchlab.runtime.home import Home

WITH_SIMPLEDB = (
    *("us-east-1", "us-west-1", "us-west-2", "eu-west-1"),
    *("ap-northeast-1", "ap-southeast-1", "ap-southeast-2", "sa-east-1"),
)
"""AWS regions that offer SimpleDB (see https://docs.aws.amazon.com/general/latest/gr/simpledb.html)."""
FOLDER = "deploy/"
"""Folder in the stack's own bucket for a template that is too large for a request."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """Replacement of busy workers in an upgrade. `protected` is AWS's value of ScaleInProtectedInstances."""

    protected: str
    note: str


BUSY_WORKERS = {
    "wait": Replacement(
        "Wait",
        "AWS replaces a busy worker when it becomes idle, and gives up after one hour (BusyWorkers wait). If tasks or "
        "the backlog last longer, use --set BusyWorkers=keep or --set BusyWorkers=interrupt, or repeat "
        "`batchlab deploy apply` to wait for another hour.",
    ),
    "keep": Replacement(
        "Ignore",
        "AWS replaces only idle workers (BusyWorkers keep). Busy workers keep the old release until the manager ends "
        "them.",
    ),
    "interrupt": Replacement(
        "Refresh",
        "AWS interrupts busy workers (BusyWorkers interrupt). Their tasks have 90 s to end, and then run again on "
        "other workers.",
    ),
}
"""Values of the template parameter BusyWorkers. The hour is a limit of AWS that cannot be changed."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Hourly cost of a stack.

    `hourly` is None if the cost is unknown. `note` explains why the cost is unknown, or why prices of another region
    are used.
    """

    hourly: Hourly | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        costs = self.hourly.to_json() if self.hourly else {}
        return {**costs, **({"note": self.note} if self.note else {})}


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of a stack: the change set that AWS has computed, the settings, and the cost of the stack.

    `parameters` contains the values of all template parameters of the stack, including default values. `notes` are
    sentences about possible problems.
    """

    settings: Settings
    account: str
    who: str
    region: str
    is_new: bool
    change_set: ChangeSet
    parameters: Mapping[str, str]
    cost: Cost
    template_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        return self.change_set.changes

    @property
    def has_new_templates(self) -> bool:
        """Whether the instances of the stack get other launch templates."""
        return any(change.type == "AWS::EC2::LaunchTemplate" for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        return {
            "stack": self.settings.stack,
            "account": self.account,
            "region": self.region,
            "as": self.who,
            "action": "create" if self.is_new else "update" if self.changes else "none",
            "changes": [
                {
                    **asdict(change),
                    "replacement": change.replacement or None,
                    "why": list(change.why),
                    "physical": change.physical or None,
                }
                for change in self.changes
            ],
            "parameters": dict(self.parameters),
            "cost": self.cost.to_json(),
            "template_bytes": self.template_bytes,
            "notes": list(self.notes),
        }


@contextmanager
def create_plan(
    stack: Stack,
    wanted: Settings,
    source: Template,
    state: State | None,
    *,
    home: Home | None = None,
    release: str | None = None,
    is_checked: bool = False,
) -> Iterator[Plan]:
    """Yield a plan that changes the stack from its current `state` to the wanted settings.

    If the plan was not executed, the end of the `with` block deletes the plan's change set. If `release` is None, the
    plan keeps the deployed release. Unless `is_checked`, the account is checked first, and UsageError is raised if the
    stack could not work.
    """
    is_new = state is None or state.is_new
    deployed = {} if state is None or is_new else state.parameters
    base = deployed.get("PoolName", template.BASE)
    values = settings.parameters(wanted, source, base)
    expanded = template.expand(source, [pool.name for pool in wanted.pools], base)
    sent = _parameters_to_send(expanded, values, deployed, release)
    effective = _effective(expanded, values)
    region = stack.account.region
    _check_ledger(effective, region)
    notes = () if is_checked else checks.check_account(stack.account, wanted, effective, state)
    if effective.get("Ledger") != "simpledb":
        expanded = template.without_simpledb(expanded)
    if not stack.account.is_real:
        pseudo = {"AWS::Region": region, "AWS::StackName": stack.name}
        release_value = deployed.get(RELEASE, "") if release is None else release
        expanded = render(expanded, {**pseudo, **effective, RELEASE: release_value})
    body = template.body(expanded)
    with _reachable(stack, body, state if deployed else None) as where:
        change_set = stack.propose(where, sent, is_new=is_new)
    try:
        plan = Plan(
            wanted,
            stack.account.id,
            stack.account.who,
            region,
            is_new,
            change_set,
            effective,
            cost(effective, region, home, shape_of(expanded)),
            len(body.encode()),
            notes,
        )
        if plan.has_new_templates and deployed.get(RELEASE):
            plan = replace(plan, notes=(*notes, BUSY_WORKERS[effective.get(BUSY, "wait")].note))
        yield plan
    finally:
        # `withdraw` does nothing after the execution of the change set, because AWS deletes an executed change set
        # itself.
        stack.withdraw(change_set, is_new=is_new)


def _check_ledger(parameters: Mapping[str, str], region: str) -> None:
    """Raise UsageError if AWS does not offer the stack's ledger in the region."""
    if parameters.get("Ledger") == "simpledb" and region not in WITH_SIMPLEDB:
        raise UsageError(
            f"SimpleDB does not exist in {region}.",
            remedy=f"Use --ledger postgres or sqlite, or a region with SimpleDB: {', '.join(WITH_SIMPLEDB)}.",
        )


def _parameters_to_send(
    expanded: Template, values: Mapping[str, str], deployed: Mapping[str, str], release: str | None
) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    for name, form in expanded.get("Parameters", {}).items():
        if name == RELEASE and release is not None:
            sent.append({"ParameterKey": name, "ParameterValue": release})
        elif name in values:
            sent.append({"ParameterKey": name, "ParameterValue": values[name]})
        elif name in deployed and (name == RELEASE or text_of(form.get("NoEcho")) == "true"):
            # AWS does not return the values of secret parameters, so the request asks CloudFormation to keep the
            # deployed value.
            sent.append({"ParameterKey": name, "UsePreviousValue": True})
    return sent


def _effective(expanded: Template, values: Mapping[str, str]) -> dict[str, str]:
    declared = expanded.get("Parameters", {})
    return {name: values.get(name, text_of(form.get("Default"))) for name, form in declared.items()}


def shape_of(template: Template) -> StackShape:
    """Return the numbers of VPC interface endpoints and alarms in the template, which AWS bills per unit."""
    resources = template["Resources"].values()
    kinds = [(resource["Type"], resource.get("Properties", {}).get("VpcEndpointType")) for resource in resources]
    return StackShape(
        interface_endpoints=kinds.count(("AWS::EC2::VPCEndpoint", "Interface")),
        alarms=kinds.count(("AWS::CloudWatch::Alarm", None)),
        pool_alarms=0,  # The number `alarms` includes the alarms of the pools.
    )


def cost(parameters: Mapping[str, str], region: str, home: Home | None, shape: StackShape) -> Cost:
    """Return the hourly cost of a stack with the template parameters `parameters`.

    If the price book lacks prices of the stack's region, the cost is computed with prices of the price book's own
    region.
    """
    book = price_book.load(home.path if home else None)
    note = ""
    try:
        try:
            return Cost(hourly_cost(parameters, book, region=region, shape=shape))
        except UsageError as error:
            if region == book.region:
                raise
            note = f"All costs are at prices of {book.region}, not of {region}. {error}"
        return Cost(hourly_cost(parameters, book, shape=shape), note)
    except UsageError as error:
        return Cost(None, f"The cost is unknown: {error}")


def offline_plan(wanted: Settings, source: Template, home: Home) -> tuple[Template, Cost]:
    """Return the template with the settings as default values of its parameters, and the cost of the stack. The
    function does not call AWS.

    Raise UsageError for settings that the template does not accept, or that do not work in the settings' region.
    """
    values = settings.parameters(wanted, source)
    expanded = template.expand(source, [pool.name for pool in wanted.pools], for_scanners=True)
    if values.get("Ledger") != "simpledb":
        expanded = template.without_simpledb(expanded)
    effective = _effective(expanded, values)
    if wanted.region:
        _check_ledger(effective, wanted.region)
    region = wanted.region or price_book.load(home.path).region
    costs = cost(effective, region, home, shape_of(expanded))
    declared = expanded["Parameters"]
    defaults = {name: {**declared[name], "Default": value} for name, value in values.items()}
    return {**expanded, "Parameters": {**declared, **defaults}}, costs


@contextmanager
def _reachable(stack: Stack, body: str, state: State | None) -> Iterator[dict[str, str]]:
    """Yield the argument of CreateChangeSet that passes the template to CloudFormation.

    The request of CreateChangeSet contains a small template itself. CloudFormation reads a larger template from the
    stack's own bucket. For a new stack, CloudFormation reads a larger template from a temporary bucket, which exists
    until the end of the `with` block.
    """
    if len(body.encode()) <= MAX_INLINE_BYTES:
        yield {"TemplateBody": body}
        return
    own = state.outputs.get("Bucket") if state else None
    account = stack.account
    with _temporary_bucket(account, stack.name) if own is None else nullcontext(own) as bucket:
        key = f"{FOLDER}{hashlib.sha256(body.encode()).hexdigest()}.json"
        s3 = account.client("s3")
        with aws_errors(f"Bucket {bucket!r}"):
            s3.put_object(Bucket=bucket, Key=key, Body=body.encode())
        try:
            signed = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
            # The URL does not need a signature, because CloudFormation reads the template with the caller's
            # permissions.
            yield {"TemplateURL": signed.partition("?")[0]}
        finally:
            with aws_errors(f"Bucket {bucket!r}"):
                s3.delete_object(Bucket=bucket, Key=key)


@contextmanager
def _temporary_bucket(account: Account, stack: str) -> Iterator[str]:
    bucket = f"{stack}-template-{secrets.token_hex(8)}"
    s3 = account.client("s3")
    location = {"CreateBucketConfiguration": {"LocationConstraint": account.region}}
    try:
        with aws_errors(f"Bucket {bucket!r}"):
            # A signal may arrive after AWS has created the bucket, and before its answer.
            s3.create_bucket(Bucket=bucket, **({} if account.region == "us-east-1" else location))
            # If this process is killed, `batchlab gc --aws` finds the temporary bucket by its tag.
            s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": TAG, "Value": stack}]})
        yield bucket
    finally:
        with suppress(NotFound), aws_errors(f"Bucket {bucket!r}"):
            s3.delete_bucket(Bucket=bucket)
