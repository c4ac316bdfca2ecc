"""Options and output of `batchlab deploy`, and the stack settings that result from the options.

The module prints a plan as text, asks the user before a change of the stack, and prints the events of an operation.

Invariant: without a terminal, a command changes a stack only with the option --yes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from batchlab.cli import output
from batchlab.cli.option_values import assignments, parse_typed_pool
from batchlab.cli.options import flag, option
from batchlab.cli.output import Stopped
from batchlab.cli.progress import StackDisplay
from batchlab.core.errors import UsageError

if TYPE_CHECKING:
    from batchlab.deploy.plan import Cost, Plan
    from batchlab.deploy.settings import PoolSettings, Settings
    from batchlab.deploy.stack import Stack
    from batchlab.deploy.stack_records import Event
    from batchlab.deploy.template import Template
    from batchlab.runtime.home import Home

STACK = option("Name of the CloudFormation stack. Default: batchlab.", "NAME")
REGION = option("AWS region, such as eu-west-1. Default: the region in the AWS configuration.", "REGION")
YES = flag("Make the changes without asking for confirmation.", "--yes")


# --- Settings ------------------------------------------------------------------------------------


_OPTIONS = {
    "pool": option(
        "Pool of workers and its instance types, such as default:0-10x2@m7i.large,m6i.large. gpus=N sets the GPUs of "
        "each instance (default: the GPUs of the instance types). With image=IMAGE, the workers run in a container "
        "image. Repeatable. The stack has only the pools that the options name.",
        "NAME:MIN-MAXxSLOTS@TYPE,TYPE[,gpus=N][,image=IMAGE]",
    ),
    "settings": option(
        "File with the stack's name, pools, and parameters, which replaces the stored settings.", "FILE.yaml"
    ),
    "stack": STACK,
    "region": REGION,
    "ledger": option("Database of the ledger: sqlite on the manager's disk, postgres, or simpledb.", "KIND"),
    "egress": option(
        "Network route from the instances to AWS: endpoints (VPC endpoints) or nat (a NAT gateway).", "KIND"
    ),
    "budget": option(
        "Monthly budget in USD, with an alarm of AWS. The alarm needs the cost allocation tag batchlab.stack in "
        "the account's billing.",
        "USD",
        min=0,
    ),
    "alarm_email": option(
        "E-mail address that receives alarms, after its owner has confirmed the address. Default: none.", "ADDRESS"
    ),
    "on_demand_base": option("Number of workers in each pool that are always On-Demand Instances.", "N", min=0),
    "on_demand_percent": option(
        "Percentage of On-Demand Instances among the workers beyond --on-demand-base.", "N", min=0, max=100
    ),
    "parameter": option("Set another parameter of the stack's template. Repeatable.", "NAME=VALUE", "--set"),
    "package": option("PyPI package that tasks need, such as pandas>=2,<3. Repeatable.", "NAME"),
    "database_ca": option(
        "File with AWS's certificates of RDS in the region, which a ledger in PostgreSQL needs.", "FILE.pem"
    ),
}
"""Declarations of the command-line options by field of DeployArguments."""


@dataclass(frozen=True, slots=True)
class DeployArguments:
    """Values of the options of `deploy plan`, `template`, and `apply` (see `takes_arguments`)."""

    pool: list[str] | None = None
    settings: Path | None = None
    stack: str | None = None
    region: str | None = None
    ledger: str | None = None
    egress: str | None = None
    budget: float | None = None
    alarm_email: str | None = None
    on_demand_base: int | None = None
    on_demand_percent: int | None = None
    parameter: list[str] | None = None
    package: list[str] | None = None
    database_ca: Path | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """Return the stack's template parameters that the user set with options. Raise UsageError for an invalid
        option.
        """
        named = {"Ledger": self.ledger, "Egress": self.egress, "AlarmEmail": self.alarm_email}
        values = {name: value for name, value in named.items() if value is not None}
        if self.budget is not None:
            values["BudgetUsd"] = f"{self.budget:.12g}"
        return {**values, **assignments(self.parameter or (), "--set AttemptDays=14", "NAME=VALUE")}

    @property
    def pool_parameters(self) -> dict[str, str]:
        """Return the values that the user's options set for all pools, by template parameter."""
        named = {"PoolOnDemandBase": self.on_demand_base, "PoolOnDemandPercent": self.on_demand_percent}
        return {name: str(value) for name, value in named.items() if value is not None}


def takes_arguments(*missing: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options of DeployArguments to a command.

    The options replace the command's parameter `arguments`. The command lacks the options whose names are in `missing`.
    """
    types = get_type_hints(DeployArguments)
    options = {name: declared for name, declared in _OPTIONS.items() if name not in missing}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def call(**values: Any) -> None:
            command(DeployArguments(**{name: values.pop(name) for name in options}), **values)

        added = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in options.items()
        ]
        own = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
        declared: Any = call
        declared.__signature__ = Signature([*added, *own])  # Typer reads the options of a command from `__signature__`.
        return call

    return decorate


def stack_and_region(arguments: DeployArguments, home: Home) -> tuple[str, str | None]:
    """Return the stack's name and region from the arguments, the settings file, or the grid's folder."""
    from batchlab.deploy import settings
    from batchlab.runtime import aws_deployment

    named = settings.load(arguments.settings) if arguments.settings else None
    stored = settings.read(home)
    name = arguments.stack or (named.stack if named else None) or (stored.stack if stored else None)
    region = arguments.region or (named.region if named else None)
    if not region and stored and stored.stack == (name or stored.stack):
        region = stored.region
    deployment = aws_deployment.read(home) if name is None else None
    if deployment:
        return deployment.stack, region or deployment.region
    return name or settings.STACK, region or None


def settings_for(arguments: DeployArguments, home: Home, stack: Stack) -> Settings:
    """Return the wanted settings of the stack.

    The settings come from the file of --settings, from the grid's folder, or else from the stack on AWS. The command's
    other options replace single settings.
    """
    from batchlab.deploy import settings

    stored = settings.read(home)
    if arguments.settings:
        wanted = settings.load(arguments.settings)
    elif stored and stored.stack == stack.name:
        wanted = stored
    elif (state := stack.state()) and state.parameters:
        wanted = settings.from_stack(stack.name, stack.account.region, state.parameters)[0]
    else:
        wanted = settings.Settings()
    return _with_arguments(replace(wanted, stack=stack.name, region=stack.account.region), arguments)


def settings_without_aws(arguments: DeployArguments, home: Home) -> Settings:
    """Return the wanted settings of the stack without calling AWS. The field `region` of the settings may be empty.

    The settings come from the file of --settings, from the grid's folder, or else from the template's defaults. The
    command's other options replace single settings.
    """
    from batchlab.deploy import settings

    name, region = stack_and_region(arguments, home)
    stored = settings.read(home)
    wanted = settings.Settings()
    if arguments.settings:
        wanted = settings.load(arguments.settings)
    elif stored and stored.stack == name:
        wanted = stored
    return _with_arguments(replace(wanted, stack=name, region=region or ""), arguments)


def rehearsal_settings(arguments: DeployArguments, stack: str) -> Settings:
    """Return the settings of the stack of a rehearsal, which are small and do not depend on earlier commands."""
    from batchlab.deploy.settings import PoolSettings, Settings

    pool = PoolSettings("default", max_size=2, slots=2, types=("m7i.large", "m6i.large"))
    wanted = _with_arguments(Settings(stack, arguments.region or "", (pool,)), arguments)
    # A protected database would outlive the rehearsal.
    return wanted.with_parameters({"Retain": "no"}) if arguments.ledger == "postgres" else wanted


def check_settings(arguments: DeployArguments, home: Home, source: Template) -> None:
    """Raise UsageError for settings that are invalid for every state of the stack on AWS."""
    from batchlab.deploy import settings

    wanted = settings_without_aws(arguments, home)
    stored = settings.read(home)
    if arguments.settings or (stored and stored.stack == wanted.stack):
        settings.parameters(wanted, source)
    else:
        # The stack on AWS may already have values for missing parameters, so check only the given values.
        settings.values(wanted, source)


def _with_arguments(wanted: Settings, arguments: DeployArguments) -> Settings:
    """Return the settings with the changes that the command line's options request."""
    if arguments.pool:
        wanted = replace(wanted, pools=_pools(arguments.pool, wanted))
    if arguments.pool_parameters:
        wanted = replace(
            wanted,
            pools=tuple(
                replace(pool, parameters=tuple(sorted({**dict(pool.parameters), **arguments.pool_parameters}.items())))
                for pool in wanted.pools
            ),
        )
    if arguments.package:
        wanted = replace(wanted, packages=tuple(arguments.package))
    if arguments.database_ca:
        wanted = replace(wanted, database_ca=str(arguments.database_ca.absolute()))
    return wanted.with_parameters(arguments.parameters)


def _pools(texts: Sequence[str], before: Settings) -> tuple[PoolSettings, ...]:
    from batchlab.core import instance_types
    from batchlab.deploy.settings import PoolSettings

    catalog = instance_types.load()
    settings_by_name = {pool_settings.name: pool_settings for pool_settings in before.pools}
    pools = []
    for text in texts:
        pool, types = parse_typed_pool(text)
        old = settings_by_name.get(pool.name, PoolSettings(pool.name))
        own = dict(old.parameters)
        if gpus := pool.gpus or catalog.gpus(types):
            own["PoolGpus"] = str(gpus)
        elif types:
            own.pop("PoolGpus", None)
        if pool.image:
            own["PoolImage"] = pool.image
        pools.append(
            replace(
                old,
                min_size=pool.min_size,
                max_size=pool.max_size,
                slots=pool.slots,
                types=types or old.types,
                parameters=tuple(sorted(own.items())),
            )
        )
    return tuple(pools)


def release_archive(wanted: Settings, archive: Path | None, home: Home) -> Path:
    """Return the given release archive, or build a new release archive.

    Raise UsageError for an invalid archive or settings, and BackendError if the build fails.
    """
    import hashlib

    from batchlab.deploy import release

    if archive is None:
        certificates = Path(wanted.database_ca) if wanted.database_ca else None
        return release.build_release(
            home.backend_folder("aws") / "releases",
            architecture=wanted.machine,
            packages=wanted.packages,
            database_ca=certificates,
            variables=dict(wanted.environment),
            say=output.say,
        )
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{archive} cannot be read: {error.strerror}.", remedy="Name an existing file that can be read."
        ) from error
    if hashlib.sha256(content).hexdigest() != release.release_of(archive):
        raise UsageError(
            f"The name of {archive} is not the SHA-256 of its content, as that of a release is.",
            remedy="The file is damaged or renamed. Without --release a new archive is made.",
        )
    return archive


def retry_notes() -> output.ThrottledNotes:
    """Return a printer of messages about the retries of one call to AWS.

    The printer prints at most one message per second.
    """
    return output.ThrottledNotes(1.0)


_PLAN_COLUMNS = ("action", "id", "type", "replacement", "why")
_SHOWN_WHY = 3


# --- Questions to the user -----------------------------------------------------------------------


@dataclass(slots=True)
class Person:
    """User interface of a deployment, which prints plans and asks questions (see `deploy.apply.Interface`)."""

    yes: bool = False
    json: bool = False
    typed: str = ""
    """Text that the user must type to agree. If `typed` is "", the user types "y" or "yes"."""
    plan: Plan | None = None

    def say(self, text: str) -> None:
        output.say(text)

    def agrees(self, question: str) -> bool:
        if self.yes:
            return True
        return output.agrees(question, typed=self.typed)

    def show(self, plan: Plan) -> None:
        self.plan = plan
        if not self.json:
            output.show(plan_text(plan))

    @contextmanager
    def watching(self, what: str, total: int) -> Iterator[Callable[[Event], None]]:
        try:
            with StackDisplay(what, total) as display:
                yield display.show_event
        except (Stopped, KeyboardInterrupt):
            output.say(
                "AWS goes on with the stack. `batchlab deploy apply` follows it again and does "
                "what is left; `batchlab deploy status` shows it."
            )
            raise


def plan_text(plan: Plan) -> str:
    """Return the plan of a stack as text with the account, the region, the cost, and the changes."""
    head = f"Stack {plan.settings.stack} in {plan.region}, account {plan.account}, as {plan.who}."
    parts = [head, "", *cost_lines(plan.cost), "", *(f"Note: {note}" for note in plan.notes)]
    if plan.notes:
        parts.append("")
    if not plan.changes:
        return "\n".join([*parts, "No changes: the stack is as it is to be."])
    verb = "Create" if plan.is_new else "Update"
    rows = [
        (
            change.action,
            change.id,
            change.type.removeprefix("AWS::"),
            change.replacement or "-",
            ", ".join(change.why[:_SHOWN_WHY]) + (", …" if len(change.why) > _SHOWN_WHY else "") or "-",
        )
        for change in plan.changes
    ]
    if all(row[-1] == "-" for row in rows):
        table = output.table(_PLAN_COLUMNS[:3], [row[:3] for row in rows])
    else:
        table = output.table(_PLAN_COLUMNS, rows)
    replaced = [change.id for change in plan.changes if change.replacement in ("True", "Conditional")]
    parts += [f"{verb}, {output.count(len(rows), 'change')}:", table]
    if replaced:
        parts.append(f"Replaced, or perhaps: {', '.join(replaced)}.")
    return "\n".join(parts)


def cost_lines(cost: Cost) -> list[str]:
    """Return the lines of text about the cost of a stack."""
    lines = [cost.hourly.text()] if cost.hourly else []
    return [*lines, *([cost.note] if cost.note else [])]
