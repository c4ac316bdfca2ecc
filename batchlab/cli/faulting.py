"""`scenario faults`: what a scenario can break, and how that comes about on each backend."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from batchlab.cli import completing, output
from batchlab.cli.options import JsonOption
from batchlab.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(faults)


def faults(
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Tell of this one only.",
            show_default=False,
            autocompletion=completing.backends,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List what a scenario can break, how that is done on each backend, or why it cannot be.

    In the simulator there is every fault.

    \b
    Example: batchlab scenario faults --backend localstack
    """
    from batchlab.replay.harm.table import BACKENDS, rows
    from batchlab.scenario.model import FaultName

    if backend is not None and backend not in BACKENDS:
        raise UsageError(
            f"Nothing is replayed on a backend {backend!r}.",
            remedy=f"There are {', '.join(BACKENDS)}; the simulator knows every fault.",
        )
    found = list(rows((backend,) if backend else BACKENDS))
    if json:
        output.show_json(
            [
                {
                    "fault": fault.value,
                    "meaning": fault.meaning,
                    "backend": there,
                    "possible": cell.possible,
                    "how": cell.how,
                    "why_not": cell.why_not,
                }
                for fault, there, cell in found
            ]
        )
        return
    if backend:
        table = output.table(
            ("fault", "there", "how, or why not"),
            [
                (fault.value, "yes" if cell.possible else "no", cell.how or cell.why_not)
                for fault, _, cell in found
            ],
        )
    else:
        yes = {(fault, there): cell.possible for fault, there, cell in found}
        table = output.table(
            ("fault", *BACKENDS, "what happens"),
            [
                (
                    fault.value,
                    *("yes" if yes[fault, one] else "no" for one in BACKENDS),
                    fault.meaning,
                )
                for fault in FaultName
            ],
        )
    output.show(table)
    if not backend and sys.stdout.isatty():
        output.say("`batchlab scenario faults --backend NAME` says how each is done, or why not.")
