"""What would be changed, and what it costs, before anything is.

Invariant: a plan that is not carried out leaves nothing behind: no change set, no empty stack, no
bucket.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from batchlab.core.errors import UsageError
from batchlab.core.pricing import price_book
from batchlab.core.pricing.hourly import Hourly, StackShape, hourly_cost
from batchlab.deploy import pool_templates, settings, template
from batchlab.deploy.account import Account, asked
from batchlab.deploy.settings import RELEASE, Settings, text_of
from batchlab.deploy.stack import TAG, Stack
from batchlab.deploy.stack_records import Change, ChangeSet, State
from batchlab.deploy.template import INLINE_BYTES, Template, rendered
from batchlab.runtime.home import Home

WITH_SIMPLEDB = (
    "us-east-1",
    "us-west-1",
    "us-west-2",
    "eu-west-1",
    "ap-northeast-1",
    "ap-southeast-1",
    "ap-southeast-2",
    "sa-east-1",
)
"""https://docs.aws.amazon.com/general/latest/gr/simpledb.html"""
FOLDER = "deploy/"
"""Where in the stack's own bucket a template lies that is too large for a request."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What the stack would cost per hour; None where that is not known, and `note` says why."""

    hourly: Hourly | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        known = self.hourly.to_json() if self.hourly else {}
        return {**known, **({"note": self.note} if self.note else {})}


@dataclass(frozen=True, slots=True)
class Plan:
    """A change set that AWS has worked out, what it is for, and what the stack will cost."""

    settings: Settings
    account: str
    who: str
    region: str
    is_new: bool
    change_set: ChangeSet
    parameters: Mapping[str, str]
    """All of the stack's, defaults too."""
    cost: Cost
    template_bytes: int

    @property
    def changes(self) -> tuple[Change, ...]:
        return self.change_set.changes

    def to_json(self) -> dict[str, Any]:
        return {
            "stack": self.settings.stack,
            "account": self.account,
            "region": self.region,
            "as": self.who,
            "action": "create" if self.is_new else "update" if self.changes else "none",
            "changes": [
                {
                    "action": one.action,
                    "id": one.id,
                    "type": one.type,
                    "replacement": one.replacement or None,
                    "why": list(one.why),
                    "physical": one.physical or None,
                }
                for one in self.changes
            ],
            "parameters": dict(self.parameters),
            "cost": self.cost.to_json(),
            "template_bytes": self.template_bytes,
        }


@contextmanager
def planned(
    stack: Stack,
    wanted: Settings,
    source: Template,
    state: State | None,
    *,
    home: Home | None = None,
    release: str | None = None,
) -> Iterator[Plan]:
    """The plan that makes of the stack, which is in `state`, what is wanted; gone after the block
    unless it was executed in it. Without a `release` the one that is deployed stays."""
    is_new = state is None or state.is_new
    deployed = {} if state is None or is_new else state.parameters
    base = deployed.get("PoolName", pool_templates.BASE)
    given = settings.parameters(wanted, source, base)
    expanded = pool_templates.expand(source, [pool.name for pool in wanted.pools], base)
    sent = _sent(expanded, given, deployed, release)
    effective = _effective(expanded, given)
    _check_region(stack.account.region, effective.get("Ledger", ""))
    if not stack.account.is_real:
        now = {RELEASE: deployed.get(RELEASE, "") if release is None else release}
        here = {"AWS::Region": stack.account.region, "AWS::StackName": stack.name}
        expanded = rendered(expanded, {**here, **effective, **now})
    body = template.body(expanded)
    with _reachable(stack, body, state if deployed else None) as where:
        change_set = stack.propose(where, sent, is_new=is_new)
    try:
        yield Plan(
            wanted,
            stack.account.id,
            stack.account.who,
            stack.account.region,
            is_new,
            change_set,
            effective,
            cost(effective, stack.account.region, home, shape_of(expanded)),
            len(body.encode()),
        )
    finally:
        # One that was executed AWS deletes by itself, and the stack is not new any more.
        stack.withdraw(change_set, is_new=is_new)


def _check_region(region: str, ledger: str) -> None:
    if ledger == "simpledb" and region not in WITH_SIMPLEDB:
        raise UsageError(
            f"There is no SimpleDB in {region}.",
            remedy="Say --ledger postgres or sqlite, or one of the regions that have it: "
            f"{', '.join(WITH_SIMPLEDB)}.",
        )


def _sent(
    expanded: Template, given: Mapping[str, str], deployed: Mapping[str, str], release: str | None
) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []
    for name, form in expanded.get("Parameters", {}).items():
        if name == RELEASE and release is not None:
            sent.append({"ParameterKey": name, "ParameterValue": release})
        elif name in given:
            sent.append({"ParameterKey": name, "ParameterValue": given[name]})
        elif name in deployed and (name == RELEASE or text_of(form.get("NoEcho")) == "true"):
            # What AWS does not tell us cannot be said again.
            sent.append({"ParameterKey": name, "UsePreviousValue": True})
    return sent


def _effective(expanded: Template, given: Mapping[str, str]) -> dict[str, str]:
    declared = expanded.get("Parameters", {})
    return {name: given.get(name, text_of(form.get("Default"))) for name, form in declared.items()}


def shape_of(made: Template) -> StackShape:
    """What of the stack is billed by the piece, as the template has it."""
    kinds = [
        (one["Type"], one.get("Properties", {}).get("VpcEndpointType"))
        for one in made["Resources"].values()
    ]
    return StackShape(
        interface_endpoints=kinds.count(("AWS::EC2::VPCEndpoint", "Interface")),
        alarms=kinds.count(("AWS::CloudWatch::Alarm", None)),
        pool_alarms=0,  # counted with the others
    )


def cost(parameters: Mapping[str, str], region: str, home: Home | None, shape: StackShape) -> Cost:
    """What a stack with these parameters costs in the region, or where the price book is from."""
    book = price_book.load(home.path if home else None)
    note = ""
    try:
        try:
            return Cost(hourly_cost(parameters, book, region=region, shape=shape))
        except UsageError as error:
            if region == book.region:
                raise
            note = f"All of this is at prices of {book.region}, not of {region}. {error}"
        return Cost(hourly_cost(parameters, book, shape=shape), note)
    except UsageError as error:
        return Cost(None, f"What it costs is not known: {error}")


def on_paper(wanted: Settings, source: Template, home: Home) -> tuple[Template, Cost]:
    """The template that the settings make, with their values as its defaults, and what its stack
    would cost; AWS is not asked. UsageError for settings that it does not take."""
    given = settings.parameters(wanted, source)
    made = pool_templates.expand(source, [pool.name for pool in wanted.pools])
    region = wanted.region or price_book.load(home.path).region
    costs = cost(_effective(made, given), region, home, shape_of(made))
    forms = made["Parameters"]
    said = {name: {**forms[name], "Default": value} for name, value in given.items()}
    return {**made, "Parameters": {**forms, **said}}, costs


@contextmanager
def _reachable(stack: Stack, body: str, state: State | None) -> Iterator[dict[str, str]]:
    """How CreateChangeSet is told the template: in the request while it fits, else from the stack's
    own bucket, or from one that lives for this block where there is no stack yet."""
    if len(body.encode()) <= INLINE_BYTES:
        yield {"TemplateBody": body}
        return
    own = state.outputs.get("Bucket") if state else None
    account = stack.account
    with _lent_bucket(account, stack.name) if own is None else _kept(own) as bucket:
        key = f"{FOLDER}{hashlib.sha256(body.encode()).hexdigest()}.json"
        s3 = account.client("s3")
        with asked(f"Bucket {bucket!r}"):
            s3.put_object(Bucket=bucket, Key=key, Body=body.encode())
        try:
            signed = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
            # CloudFormation reads it with the caller's own permissions.
            yield {"TemplateURL": signed.partition("?")[0]}
        finally:
            with asked(f"Bucket {bucket!r}"):
                s3.delete_object(Bucket=bucket, Key=key)


@contextmanager
def _kept(bucket: str) -> Iterator[str]:
    yield bucket


@contextmanager
def _lent_bucket(account: Account, stack: str) -> Iterator[str]:
    bucket = f"{stack}-template-{secrets.token_hex(8)}"
    s3 = account.client("s3")
    place = {"LocationConstraint": account.region}
    with asked(f"Bucket {bucket!r}"):
        s3.create_bucket(
            Bucket=bucket,
            **({} if account.region == "us-east-1" else {"CreateBucketConfiguration": place}),
        )
    try:
        with asked(f"Bucket {bucket!r}"):
            # Found by its tag, should this process be killed before it is gone.
            s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": TAG, "Value": stack}]})
        yield bucket
    finally:
        with asked(f"Bucket {bucket!r}"):
            s3.delete_bucket(Bucket=bucket)
