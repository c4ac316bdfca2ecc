"""Commands of `batchlab deploy`, which plan, create, update, show, and destroy the CloudFormation stack of a grid on
AWS.

Invariant: the commands `plan`, `template`, and `status` do not change resources of the stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchlab.cli import output
from batchlab.cli.deploy_options import (
    REGION,
    STACK,
    YES,
    DeployArguments,
    Person,
    check_settings,
    cost_lines,
    rehearsal_settings,
    release_archive,
    retry_notes,
    settings_for,
    settings_without_aws,
    stack_and_region,
    takes_arguments,
)
from batchlab.cli.groups import command_group
from batchlab.cli.option_values import home_of
from batchlab.cli.options import HOME, JSON, flag, option
from batchlab.core.errors import NotFound, UsageError

if TYPE_CHECKING:
    from batchlab.deploy.stack import Stack
    from batchlab.deploy.status import Status
    from batchlab.runtime.home import Home

RELEASE = option("Existing release archive that is deployed instead of a new release archive.", "FILE.tar.gz")

app = command_group("deploy")


@app.callback()
def deploy_() -> None:
    """Create, inspect, update, and delete the stack of a grid on AWS.

    \b
    Example: batchlab deploy plan --region eu-west-1 --pool default:0-10x2@m7i.large
    """


@app.command()
@takes_arguments()
def plan(arguments: DeployArguments, home: Path | None = HOME, json: bool = JSON) -> None:
    """Show the planned changes of the stack and their cost without applying the changes.

    The command stores its options in the grid's folder for `deploy apply` and the next plan.
    `deploy apply` deploys the release of this version of batchlab.

    \b
    Example: batchlab deploy plan --pool default:0-10x2@m7i.large --budget 150
    """
    from batchlab.deploy import settings, template
    from batchlab.deploy.checks import check_database_ca
    from batchlab.deploy.plan import create_plan
    from batchlab.deploy.stack_records import refuse_unchangeable

    where, source = home_of(home), template.load(template.shipped_template())
    check_settings(arguments, where, source)
    with _stack(arguments, where) as stack:
        state = stack.state()
        if state:
            refuse_unchangeable(state)
        wanted = settings_for(arguments, where, stack)
        check_database_ca(wanted)
        with create_plan(stack, wanted, source, state, home=where) as plan:
            if json:
                output.show_json(plan.to_json())
            else:
                Person().show(plan)
        settings.write(where, wanted)


@app.command("template")
@takes_arguments("budget", "alarm_email", "on_demand_base", "on_demand_percent", "package", "database_ca")
def template_(arguments: DeployArguments, home: Path | None = HOME) -> None:
    """Print the CloudFormation template of a stack without calling AWS. The options are the default values of the
    template's parameters.

    The command needs no credentials. It prints the cost of the idle stack to stderr.

    \b
    Example: batchlab deploy template --pool default:0-10x2@m7i.large --egress nat > stack.json
    """
    from batchlab.deploy import plan, template

    where = home_of(home)
    wanted = settings_without_aws(arguments, where)
    document, costs = plan.offline_plan(wanted, template.load(template.shipped_template()), where)
    if costs.hourly is None:  # The text may name a mistake in the settings, so it is printed before the long template.
        output.say(costs.note)
    output.show_json(document, indent=1)
    if costs.hourly:
        output.say("\n".join(cost_lines(costs)))


@app.command()
@takes_arguments()
def apply(
    arguments: DeployArguments,
    release: Path | None = RELEASE,
    yes: bool = YES,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Create or update the stack after showing the plan.

    The creation of a stack takes some minutes, or 15 minutes with RDS. After Ctrl-C, AWS continues
    the operation. The next `deploy apply` waits for the end of this operation and does the
    remaining work.

    \b
    Example: batchlab deploy apply
    """
    from batchlab.deploy import template
    from batchlab.deploy.apply import Apply

    where, person = home_of(home), Person(yes, json)
    source = template.load(template.shipped_template())
    check_settings(arguments, where, source)
    with _stack(arguments, where) as stack:
        wanted = settings_for(arguments, where, stack)
        archive = cache(partial(release_archive, wanted, release, where))
        done = Apply(stack, wanted, source, where, person, archive, release).run()
    if done is None:
        raise typer.Exit(1)
    if json:
        changes = person.plan.to_json() if person.plan else None
        output.show_json({"plan": changes, "deployment": done.document()})
    else:
        output.say(
            f"The stack {done.stack} is up in {done.region}; `batchlab run FILE --backend aws` runs a job on it."
        )


@app.command()
def status(stack: str | None = STACK, region: str | None = REGION, home: Path | None = HOME, json: bool = JSON) -> None:
    """Show the stack with its groups, queues, and alarms.

    The grid's folder contains the locations of the stack's resources. The command updates these
    locations if they have changed.

    \b
    Example: batchlab deploy status --stack batchlab --region eu-west-1
    """
    from batchlab.deploy.status import read_status
    from batchlab.runtime import aws_deployment

    where = home_of(home)
    with _stack(DeployArguments(stack=stack, region=region), where) as deployed:
        state = deployed.state()
        if state is None:
            raise NotFound(
                f"The stack {deployed.name} does not exist in {deployed.account.region}.",
                remedy="`batchlab deploy apply` creates it; --stack and --region name another.",
            )
        status = read_status(deployed, state, where)
    if json:
        output.show_json(status.to_json())
    else:
        _show(status, f"in {deployed.account.region}, account {deployed.account.id}")
    if status.drift and status.deployment and not state.is_moving:
        aws_deployment.write(where, status.deployment)
        output.say(f"{aws_deployment.path_in(where)} is written anew ({', '.join(status.drift)}).")


def _show(status: Status, where: str) -> None:
    state = status.state
    release = state.parameters.get("Release", "")
    output.show(
        f"stack {state.name}: {state.status} since {output.moment(state.changed_s)}"
        f"{', protected' if state.is_protected else ''}"
    )
    output.show(where)
    if status.cause:
        output.show(f"  {status.cause.resource} ({status.cause.type}): {status.cause.reason}")
        output.show(f"  {status.cause.remedy}")
    if status.deployment:
        output.show(f"release {release[:12] or 'none yet'}, log group {status.deployment.log_group}")
        output.show(f"manager {status.manager or 'not in service'}")
    if status.groups:
        columns = ("group", "min", "max", "desired", "inservice", "others", "refresh")
        rows = [
            (
                group.name,
                group.smallest,
                group.largest,
                group.desired,
                len(group.instances),
                group.others,
                group.refresh or "-",
            )
            for group in status.groups
        ]
        output.show("\n" + output.table(columns, rows))
    if status.queues:
        queues = [(queue.name, queue.visible, queue.in_flight, queue.delayed) for queue in status.queues]
        output.show("\n" + output.table(("queue", "visible", "in flight", "delayed"), queues))
    if status.alarms:
        alarms = [(alarm.name, alarm.state, alarm.reason) for alarm in status.alarms]
        output.show("\n" + output.table(("alarm", "state", "reason"), alarms))


@app.command()
def destroy(
    delete_data: bool = flag(
        "Also delete the bucket with all its objects, and the ledger's database.", "--delete-data"
    ),
    stack: str | None = STACK,
    region: str | None = REGION,
    yes: bool = YES,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Delete the stack and all its resources on AWS.

    Without --delete-data, the stack's data remains: a bucket with objects, a last snapshot of the
    database, or a SimpleDB domain. The command lists the remaining resources. The command refuses
    to run if the template itself would delete data.

    \b
    Example: batchlab deploy destroy --delete-data
    """
    from batchlab.deploy.destroy import Destroy
    from batchlab.runtime import aws_deployment

    where = home_of(home)
    with _stack(DeployArguments(stack=stack, region=region), where) as deployed:
        person = Person(yes, json, typed=deployed.name if delete_data else "")
        stays = Destroy(deployed, person, delete_data).run()
        name = deployed.name
    if stays is None:
        raise typer.Exit(1)
    deployment = aws_deployment.read(where)
    if deployment and deployment.stack == name:
        aws_deployment.forget(where)
    if json:
        output.show_json({"stack": name, "kept": [{"id": o.id, "type": o.type, "physical": o.physical} for o in stays]})
        return
    output.say(f"The stack {name} is gone.")
    for stay in stays:
        output.show(f"{stay.physical} ({stay.type}) stays.")


@app.command()
@takes_arguments("settings", "stack", "budget", "alarm_email")
def rehearse(
    arguments: DeployArguments,
    budget: str | None = option(
        "Maximum cost of the rehearsal, such as 5USD. The rehearsal ends early if it may cost more.", "AMOUNT"
    ),
    release: Path | None = RELEASE,
    yes: bool = YES,
    home: Path | None = HOME,
    json: bool = JSON,
) -> None:
    """Rehearse a grid in an AWS account: create a stack, test the stack, and destroy the stack.

    The rehearsal checks the rules of S3 and SQS, runs the shipped examples, terminates a worker and
    the manager, interrupts a Spot Instance, and compares the bill with the estimate. It has a stack
    of its own, batchlab-rehearsal, and always destroys this stack with its data at the end. If a
    rehearsal was killed, the next rehearsal removes its resources first. The report is in
    aws/rehearsal/report.md in the grid's folder.

    The exit code is 1 if a step failed, and 130 after an interruption.

    \b
    Example: batchlab deploy rehearse --budget 5USD --region eu-west-1
    """
    from batchlab.cli import rehearsal
    from batchlab.cli.rehearsal_steps import STACK as REHEARSAL
    from batchlab.core.pricing import price_book

    if budget is None:
        raise UsageError("A rehearsal on AWS costs money, so it needs a budget.", remedy="Add --budget 5USD.")
    usd, where, wanted = price_book.parse(budget), home_of(home), rehearsal_settings(arguments, REHEARSAL)
    archive = cache(partial(release_archive, wanted, release, where))
    with rehearsal.opened(wanted, where, archive) as site:
        rehearsal.check_cost(site.expected, usd)
        output.say(site.expected.text())
        if not Person(yes).agrees(rehearsal.question(site)):
            raise typer.Exit(1)
        with rehearsal.Signals() as signals:
            done = rehearsal.rehearse(site, usd, signals)
    output.answer(json, done.document, rehearsal.summary(done))
    if not done.rehearsal.has_succeeded:
        raise typer.Exit(output.INTERRUPTED if done.rehearsal.is_interrupted else 1)


@contextmanager
def _stack(arguments: DeployArguments, home: Home) -> Iterator[Stack]:
    """Yield the CloudFormation stack that the command's arguments or the files in the grid's folder name."""
    from batchlab.deploy.account import Account
    from batchlab.deploy.stack import Stack

    name, region = stack_and_region(arguments, home)
    with Account.open(region, notes=retry_notes) as account:
        yield Stack(account, name)
