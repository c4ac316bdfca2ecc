"""The commands, put together.

Invariant: every error that batchlab raises on purpose is a sentence and a remedy on stderr, and
its own exit code; no other error shows a traceback unless --debug asks for it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from batchlab.cli import (
    admin,
    asg,
    caps,
    checking,
    conform,
    cost,
    deploy,
    grid,
    jobs,
    logs,
    notify,
    output,
    prices,
    replay_task,
    report,
    report_diff,
    running,
    scenario,
    schedule,
    signals,
    sim,
    tasks,
)
from batchlab.errors import BatchlabError

UNEXPECTED = 70
"""EX_SOFTWARE of sysexits.h: none of the codes that say something about a job."""

_DEBUGS = "replay-task"
"""The command that has a --debug of its own."""

_ORDER = (
    *(
        "demo",
        "init",
        "run",
        "job",
        "schedule",
        "grid",
        "notify",
        "deploy",
        "report",
        "scenario",
        "cost",
        "prices",
        "ledger",
        "schema",
    ),
    *("doctor", "gc"),
    *("sim", "conform", "asg", "manager", "worker", "connect"),
)


class _Commands(TyperGroup):
    """Listed in the order in which a newcomer needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


def _version(wanted: bool) -> None:
    if wanted:
        from batchlab import __version__

        output.show(f"batchlab {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="batchlab",
    cls=_Commands,
    no_args_is_help=True,
    # Plain help: rich's takes longer to import than all the rest of a command.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(
    epilog="Exit codes: 0 success, 1 the job failed, 2 wrong usage, 3 the grid or its backend "
    "cannot be reached, 130 interrupted."
)
def batchlab(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")
    ] = False,
) -> None:
    """Run batch jobs on a grid of workers: on this machine, in a simulator, or on AWS.

    \b
    New here?   batchlab demo
    Your own:   batchlab init first && batchlab run first/job.yaml
    """


jobs.app.command("check")(checking.check)
jobs.app.command("cap")(caps.job_cap)
jobs.app.command("logs")(logs.logs)
tasks.register(jobs.app)
jobs.app.command("replay-task")(replay_task.replay_task)
grid.app.command("cap")(caps.grid_cap)
report.app.command("diff")(report_diff.diff)
running.register(app)
app.add_typer(jobs.app, name="job")
app.add_typer(schedule.app, name="schedule")
app.add_typer(grid.app, name="grid")
app.add_typer(report.app, name="report")
app.add_typer(notify.app, name="notify")
app.add_typer(scenario.app, name="scenario")
app.add_typer(cost.app, name="cost")
app.add_typer(prices.app, name="prices")
app.add_typer(sim.app, name="sim")
conform.register(app)
app.add_typer(asg.app, name="asg")
app.add_typer(deploy.app, name="deploy")
admin.register(app)


def start(arguments: Sequence[str]) -> None:
    """Run one command line; exits with its code."""
    signals.install()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    if _DEBUGS in arguments[:end]:
        end = list(arguments).index(_DEBUGS)  # behind it, --debug is the command's own too
    given = [one for i, one in enumerate(arguments) if one != "--debug" or i > end]
    try:
        app(given, prog_name="batchlab")
    except BatchlabError as error:
        if debug:
            traceback.print_exc()
        output.complain(error)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the outermost place: told, and exit code 70
        if debug:
            traceback.print_exc()
        output.say(f"Error: something unexpected happened: {type(error).__name__}: {error}")
        if not debug:
            output.say("  The same command with --debug shows where.")
        sys.exit(UNEXPECTED)
