"""`batchlab deploy …`: the stack on AWS, shown before it is changed.

Invariant: a command that only looks changes nothing on AWS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from batchlab.cli import output
from batchlab.cli.deploy_options import (
    BaseOption,
    BudgetOption,
    CertificatesOption,
    EgressOption,
    EmailOption,
    LedgerOption,
    PackageOption,
    ParameterOption,
    PercentOption,
    PoolsOption,
    RegionOption,
    SettingsOption,
    StackOption,
    YesOption,
)
from batchlab.cli.options import HomeOption, JsonOption, home_of

if TYPE_CHECKING:
    from batchlab.cli.deploy_output import Given
    from batchlab.deploy.stack import Stack
    from batchlab.deploy.status import Status
    from batchlab.runtime.home import Home

app = typer.Typer(no_args_is_help=True)


@app.callback()
def deploy_() -> None:
    """Make, look at, change and end the stack on AWS.

    \b
    Example: batchlab deploy plan --region eu-west-1 --pool default:0-10x2@m7i.large
    """


@app.command()
def plan(
    pool: PoolsOption = None,
    settings: SettingsOption = None,
    stack: StackOption = None,
    region: RegionOption = None,
    ledger: LedgerOption = None,
    egress: EgressOption = None,
    budget: BudgetOption = None,
    alarm_email: EmailOption = None,
    on_demand_base: BaseOption = None,
    on_demand_percent: PercentOption = None,
    parameter: ParameterOption = None,
    package: PackageOption = None,
    database_ca: CertificatesOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show what would be made or changed, and what it costs. Nothing is.

    What was said is kept in the grid's folder, so `apply` and the next plan need not be told again.
    The release stays the one that is deployed: `apply` brings this version's.

    \b
    Example: batchlab deploy plan --pool default:0-10x2@m7i.large --ledger postgres --budget 150
    """
    from batchlab.cli.deploy_output import Person, check, chosen
    from batchlab.deploy import settings as settings_
    from batchlab.deploy import template
    from batchlab.deploy.plan import planned
    from batchlab.deploy.stack_records import refuse_unchangeable

    given = _given(
        pool,
        settings,
        stack,
        region,
        parameter,
        {
            "Ledger": ledger,
            "Egress": egress,
            "BudgetUsd": budget,
            "AlarmEmail": alarm_email,
        },
        {"PoolOnDemandBase": on_demand_base, "PoolOnDemandPercent": on_demand_percent},
        package,
        database_ca,
    )
    where, source = home_of(home), template.load(template.shipped())
    check(given, where, source)
    with _stack(given, where) as there:
        state = there.state()
        if state:
            refuse_unchangeable(state)
        wanted = chosen(given, where, there)
        with planned(there, wanted, source, state, home=where) as found:
            if json:
                output.show_json(found.to_json())
            else:
                Person().show(found)
        settings_.write(where, wanted)


@app.command(name="template")
def template_(
    pool: PoolsOption = None,
    settings: SettingsOption = None,
    stack: StackOption = None,
    region: RegionOption = None,
    ledger: LedgerOption = None,
    egress: EgressOption = None,
    parameter: ParameterOption = None,
    home: HomeOption = None,
) -> None:
    """Print the template of a stack, what you say as its defaults. AWS is not asked.

    For whoever reads, lints or scans it before there are credentials: JSON on stdout, and on stderr
    what the stack would cost while nothing runs.

    \b
    Example: batchlab deploy template --pool default:0-10x2@m7i.large --egress nat > stack.json
    """
    from batchlab.cli.deploy_output import cost_lines, on_paper
    from batchlab.deploy import plan, template

    named: dict[str, str | float | None] = {"Ledger": ledger, "Egress": egress}
    given = _given(pool, settings, stack, region, parameter, named, {}, None, None)
    where = home_of(home)
    wanted = on_paper(given, where)
    made, costs = plan.on_paper(wanted, template.load(template.shipped()), where)
    output.show_json(made, indent=1)
    output.say("\n".join(cost_lines(costs)))


@app.command()
def apply(
    pool: PoolsOption = None,
    settings: SettingsOption = None,
    stack: StackOption = None,
    region: RegionOption = None,
    ledger: LedgerOption = None,
    egress: EgressOption = None,
    budget: BudgetOption = None,
    alarm_email: EmailOption = None,
    on_demand_base: BaseOption = None,
    on_demand_percent: PercentOption = None,
    parameter: ParameterOption = None,
    package: PackageOption = None,
    database_ca: CertificatesOption = None,
    release: Annotated[
        Path | None,
        typer.Option(
            "--release",
            metavar="FILE.tar.gz",
            help="A release archive that is there already, in place of one made now.",
            show_default=False,
        ),
    ] = None,
    yes: YesOption = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Make the stack, or change it, after showing the plan.

    Made anew it takes some minutes, with RDS a quarter of an hour. Ctrl-C leaves AWS to go on; the
    next `apply` follows what is going on and does what is left.

    \b
    Example: batchlab deploy apply
    """
    from batchlab.cli.deploy_output import Person, check, chosen, release_for
    from batchlab.deploy import template
    from batchlab.deploy.apply import Apply

    given = _given(
        pool,
        settings,
        stack,
        region,
        parameter,
        {
            "Ledger": ledger,
            "Egress": egress,
            "BudgetUsd": budget,
            "AlarmEmail": alarm_email,
        },
        {"PoolOnDemandBase": on_demand_base, "PoolOnDemandPercent": on_demand_percent},
        package,
        database_ca,
    )
    where, person = home_of(home), Person(yes, json)
    source = template.load(template.shipped())
    check(given, where, source)
    with _stack(given, where) as there:
        wanted = chosen(given, where, there)
        archive = cache(partial(release_for, wanted, release, where))
        done = Apply(there, wanted, source, where, person, archive).run()
    if done is None:
        raise typer.Exit(1)
    if json:
        changes = person.plan.to_json() if person.plan else None
        output.show_json({"plan": changes, "deployment": done.document()})
    else:
        output.say(
            f"The stack {done.stack} is up in {done.region}; `batchlab run FILE --backend "
            "aws` runs a job on it."
        )


@app.command()
def status(
    stack: StackOption = None,
    region: RegionOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """Show the stack, its groups, queues and alarms.

    Where the grid's folder does not know where the stack's parts are, or says it otherwise, it is
    told anew.

    \b
    Example: batchlab deploy status --stack batchlab --region eu-west-1
    """
    from batchlab.cli.deploy_output import Given
    from batchlab.core.errors import NotFound
    from batchlab.deploy.status import look
    from batchlab.runtime.aws import deployment

    where = home_of(home)
    with _stack(Given(stack=stack, region=region), where) as there:
        state = there.state()
        if state is None:
            raise NotFound(
                f"There is no stack {there.name} in {there.account.region}.",
                remedy="`batchlab deploy apply` makes one; --stack and --region name another.",
            )
        found = look(there, state, where)
    if json:
        output.show_json(found.to_json())
    else:
        _show(found, f"in {there.account.region}, account {there.account.id}")
    if found.drift and found.deployment and not state.is_moving:
        deployment.write(where, found.deployment)
        output.say(f"{deployment.path_in(where)} is written anew ({', '.join(found.drift)}).")


def _show(found: Status, where: str) -> None:
    state = found.state
    release = state.parameters.get("Release", "")
    output.show(
        f"stack {state.name}: {state.status} since {output.moment(state.changed_s)}"
        f"{', protected' if state.is_protected else ''}"
    )
    output.show(where)
    if found.cause:
        output.show(f"  {found.cause.resource} ({found.cause.type}): {found.cause.reason}")
        output.show(f"  {found.cause.remedy}")
    if found.deployment:
        output.show(f"release {release[:12] or 'none yet'}, log group {found.deployment.log_group}")
        output.show(f"manager {found.manager or 'not in service'}")
    if found.groups:
        columns = ("group", "min", "max", "desired", "inservice", "others", "refresh")
        rows = [
            (
                one.name,
                one.smallest,
                one.largest,
                one.desired,
                len(one.instances),
                one.others,
                one.refresh or "-",
            )
            for one in found.groups
        ]
        output.show("\n" + output.table(columns, rows))
    if found.queues:
        queues = [(one.name, one.visible, one.in_flight, one.delayed) for one in found.queues]
        output.show("\n" + output.table(("queue", "visible", "in flight", "delayed"), queues))
    if found.alarms:
        alarms = [(one.name, one.state, one.reason) for one in found.alarms]
        output.show("\n" + output.table(("alarm", "state", "reason"), alarms))


@app.command()
def destroy(
    delete_data: Annotated[
        bool,
        typer.Option(
            "--delete-data", help="Also the bucket with all objects, and the ledger's database."
        ),
    ] = False,
    stack: StackOption = None,
    region: RegionOption = None,
    yes: YesOption = False,
    home: HomeOption = None,
    json: JsonOption = False,
) -> None:
    """End the stack, and everything on AWS that it has made.

    Data stays unless --delete-data says otherwise: a bucket that has objects, a last snapshot of
    the database, a SimpleDB domain; what stays is listed. Refused where a template would have data
    deleted.

    \b
    Example: batchlab deploy destroy --delete-data
    """
    from batchlab.cli.deploy_output import Given, Person
    from batchlab.deploy.destroy import Destroy
    from batchlab.runtime.aws import deployment

    where = home_of(home)
    with _stack(Given(stack=stack, region=region), where) as there:
        person = Person(yes, json, typed=there.name if delete_data else "")
        stays = Destroy(there, person, delete_data).run()
        name = there.name
    if stays is None:
        raise typer.Exit(1)
    known = deployment.read(where)
    if known and known.stack == name:
        deployment.forget(where)
    if json:
        output.show_json(
            {
                "stack": name,
                "kept": [{"id": o.id, "type": o.type, "physical": o.physical} for o in stays],
            }
        )
        return
    output.say(f"The stack {name} is gone.")
    for one in stays:
        output.show(f"{one.physical} ({one.type}) stays.")


@contextmanager
def _stack(given: Given, home: Home) -> Iterator[Stack]:
    """The stack that is meant; a failure of it is told as any other error."""
    from batchlab.cli.deploy_output import place, tries
    from batchlab.deploy.account import Account
    from batchlab.deploy.stack import Stack

    name, region = place(given, home)
    with Account.open(region, notes=tries) as account:
        yield Stack(account, name)


def _given(
    pools: list[str] | None,
    file: Path | None,
    stack: str | None,
    region: str | None,
    parameters: list[str] | None,
    named: dict[str, str | float | None],
    per_pool: dict[str, int | None],
    packages: list[str] | None,
    database_ca: Path | None,
) -> Given:
    from batchlab.cli.deploy_output import Given, assignments

    said = {name: _text(value) for name, value in named.items() if value is not None}
    return Given(
        pools or (),
        file,
        stack,
        region,
        {**said, **assignments(parameters or ())},
        {name: str(value) for name, value in per_pool.items() if value is not None},
        packages or (),
        database_ca,
    )


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"
