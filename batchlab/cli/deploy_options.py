"""Options of `batchlab deploy`, of which plan and apply have the same.

`batchlab gc --aws`: what stacks have had on AWS, and what of it is left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from batchlab.cli import output

StackOption = Annotated[
    str | None,
    typer.Option(
        "--stack", metavar="NAME", help="The stack; batchlab unless said.", show_default=False
    ),
]
RegionOption = Annotated[
    str | None,
    typer.Option(
        "--region",
        metavar="REGION",
        help="Such as eu-west-1; without it the one that AWS's own configuration says.",
        show_default=False,
    ),
]
PoolsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        metavar="NAME:MIN-MAXxSLOTS@TYPE,TYPE",
        help="A pool of workers and the instance types it may use, such as "
        "default:0-10x2@m7i.large,m6i.large; may be repeated, and then these are all there are.",
        show_default=False,
    ),
]
SettingsOption = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        metavar="FILE.yaml",
        help="Stack, pools and parameters in a file, in place of what was said last.",
        show_default=False,
    ),
]
LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="KIND",
        help="Where people and the planner read: sqlite on the manager's disk, postgres, simpledb.",
        show_default=False,
    ),
]
EgressOption = Annotated[
    str | None,
    typer.Option(
        "--egress",
        metavar="KIND",
        help="How instances reach AWS: endpoints in the VPC, or a nat gateway.",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="USD",
        min=0,
        help="Alarm where a month would cost more; AWS counts once the tag batchlab.stack is "
        "activated in the account's billing.",
        show_default=False,
    ),
]
EmailOption = Annotated[
    str | None,
    typer.Option(
        "--alarm-email",
        metavar="ADDRESS",
        help="Who hears of alarms, once the address has confirmed it; unless said, nobody.",
        show_default=False,
    ),
]
BaseOption = Annotated[
    int | None,
    typer.Option(
        "--on-demand-base",
        metavar="N",
        min=0,
        help="So many workers of each pool are never Spot.",
        show_default=False,
    ),
]
PercentOption = Annotated[
    int | None,
    typer.Option(
        "--on-demand-percent",
        metavar="N",
        min=0,
        max=100,
        help="Of the workers above that, so many in a hundred are not Spot.",
        show_default=False,
    ),
]
ParameterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other parameter of the stack's template; may be repeated.",
        show_default=False,
    ),
]
PackageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--package",
        metavar="NAME",
        help="A package of PyPI that tasks need, such as pandas>=2,<3; may be repeated.",
        show_default=False,
    ),
]
CertificatesOption = Annotated[
    Path | None,
    typer.Option(
        "--database-ca",
        metavar="FILE.pem",
        help="Certificates that PostgreSQL's is checked against: AWS's bundle for the region.",
        show_default=False,
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


_COLUMNS = ("stack", "kind", "name", "is")


def sweep_aws(region: str | None, names: Sequence[str], *, removing: bool, json: bool) -> None:
    """List it, and remove what no stack has any more where that is wanted; what is known by its
    name alone only where it is one of `names`. BackendError where something could not be."""
    from batchlab.cli.deploy_output import tries
    from batchlab.core.errors import BackendError
    from batchlab.deploy.account import Account
    from batchlab.deploy.leftovers import Leftovers, chosen, remove_left

    with Account.open(region, notes=tries) as account:
        there = Leftovers(account)
        tagged = list(there.tagged())
        named = list(there.named({one.thing.name for one in tagged}, output.say))
        found = sorted([*tagged, *named], key=lambda one: (one.thing.stack, one.thing.arn))
        going = chosen(found, names)
        rows, shown, stays = [], [], 0
        for one in found:
            thing = one.thing
            goes = removing and one in going
            why = remove_left(account, one, output.say) if goes else ""
            stays += bool(why)
            fate = "in use" if one.is_used else "left, by its name" if one.is_guessed else "left"
            if goes:
                fate = f"left: {why}" if why else "removed"
            rows.append((thing.stack, thing.kind, thing.name, fate))
            shown.append(
                {
                    "stack": thing.stack,
                    "kind": thing.kind,
                    "name": thing.name,
                    "arn": thing.arn,
                    "known_by": "name" if one.is_guessed else "tag",
                    "left": not one.is_used,
                    "removed": goes and not why,
                    "why": why or None,
                }
            )
        where = f"account {account.id}, {account.region}"
    if json:
        output.show_json(shown)
    elif rows:
        output.show(output.table(_COLUMNS, rows))
    else:
        output.say(f"Nothing in {where} has the tag of a stack, or a name as a stack gives them.")
    if not json:
        _say_how(
            0 if removing else sum(1 for one in tagged if not one.is_used),
            sum(1 for one in named if not (one.is_used or (removing and one in going))),
        )
    if stays:
        raise BackendError(
            f"{output.count(stays, 'thing')} could not be removed.",
            remedy="The list says why; what is of another kind is removed in the console.",
        )


def _say_how(by_tag: int, by_name: int) -> None:
    """How what is left would be removed."""
    if by_tag:
        output.say(f"{output.count(by_tag, 'thing')} left; `batchlab gc --aws --yes` removes it.")
    if by_name:
        output.say(
            f"{output.count(by_name, 'thing')} left that only the name says to be a stack's: look "
            "whose it is; `batchlab gc --aws --yes --name NAME` removes it."
        )
