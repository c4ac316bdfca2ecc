"""Conversion of a stack's outputs to the deployment that `--backend aws` uses."""

from __future__ import annotations

from batchlab.core.errors import BackendError
from batchlab.core.model import Pool
from batchlab.deploy.settings import from_stack
from batchlab.deploy.stack_records import State
from batchlab.runtime import factory
from batchlab.runtime.aws.deployment import AwsDeployment, Database

IAM_USER = "batchlab_iam"
"""The template's name for the database user of an IAM token."""


def of(state: State, name: str) -> str:
    """Return one output. Raises BackendError if the stack does not have it."""
    if found := state.outputs.get(name):
        return found
    raise BackendError(
        f"The stack {state.name} has no output {name}.",
        remedy="Was it made from this version's template? `batchlab deploy apply` updates it.",
    )


def pool_groups(state: State) -> list[str]:
    """Return the names of the Auto Scaling groups of the workers."""
    return [one for one in state.outputs.get("PoolGroups", "").split(",") if one]


def deployment_of(state: State, region: str, python: str = "") -> AwsDeployment:
    """Return the deployment from the outputs and parameters of the stack. The caller gives the
    `python` of its release, which they do not contain. Raises BackendError if an output is
    missing."""
    ledger = of(state, "Ledger")
    database = None
    if ledger == "postgres":
        by_iam = state.parameters.get("DatabaseLogin") == "iam"
        database = Database(
            of(state, "DatabaseHost"),
            int(of(state, "DatabasePort")),
            of(state, "DatabaseName"),
            "" if by_iam else of(state, "DatabaseSecret"),
            IAM_USER if by_iam else "",
            by_iam,
        )
    return AwsDeployment(
        stack=state.name,
        region=state.outputs.get("Region", region),
        bucket=of(state, "Bucket"),
        prefix=of(state, "QueuePrefix"),
        manager_group=of(state, "ManagerGroup"),
        token_secret=of(state, "TokenSecret"),
        pools=_pools(state, region),
        ledger=ledger,
        database=database,
        domain=of(state, "Domain") if ledger == "simpledb" else "",
        log_group=state.outputs.get("LogGroup", ""),
        python=python,
        egress="own" if state.parameters.get("VpcId") else state.parameters.get("Egress", ""),
    )


def _pools(state: State, region: str) -> tuple[Pool, ...]:
    settings, _ = from_stack(state.name, region, state.parameters)
    (usual,) = factory.load("aws").pools
    return tuple(
        Pool(
            one.name,
            one.min_size,
            one.max_size,
            one.slots,
            usual.boot_s,
            instance_type=one.types[0] if one.types else usual.instance_type,
        )
        for one in settings.pools
    )
