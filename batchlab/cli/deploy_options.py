"""Options of `batchlab deploy`, of which plan and apply have the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
