"""The commands, put together.

Invariant: every error that batchlab raises on purpose is a sentence and a remedy on stderr, and
its own exit code; no other error shows a traceback unless --debug asks for it. A command line
imports the module of its own command and no other's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_group

from batchlab.cli import lacking, output, signals
from batchlab.core.errors import BatchlabError

UNEXPECTED = 70
"""EX_SOFTWARE of sysexits.h: none of the codes that say something about a job."""

_DEBUGS = "replay-task"
"""The command that has a --debug of its own."""


# --- What adds the commands, each with what it imports -------------------------------------------


def _admin(app: typer.Typer) -> None:
    from batchlab.cli import admin

    admin.register(app)


def _asg(app: typer.Typer) -> None:
    from batchlab.cli import asg

    app.add_typer(asg.app, name="asg")


def _conform(app: typer.Typer) -> None:
    from batchlab.cli import conform

    conform.register(app)


def _cost(app: typer.Typer) -> None:
    from batchlab.cli import cost

    app.add_typer(cost.app, name="cost")


def _deploy(app: typer.Typer) -> None:
    from batchlab.cli import deploy

    app.add_typer(deploy.app, name="deploy")


def _grid(app: typer.Typer) -> None:
    from batchlab.cli import grid
    from batchlab.cli import prices as caps

    grid.app.command("cap")(caps.grid_cap)
    app.add_typer(grid.app, name="grid")


def _job(app: typer.Typer) -> None:
    from batchlab.cli import job, job_tasks, logs, replay_task
    from batchlab.cli import prices as caps

    job.app.command("check")(job.check)
    job.app.command("cap")(caps.job_cap)
    job.app.command("logs")(logs.logs)
    job_tasks.register(job.app)
    job.app.command("replay-task")(replay_task.replay_task)
    app.add_typer(job.app, name="job")


def _notify(app: typer.Typer) -> None:
    from batchlab.cli import notify

    app.add_typer(notify.app, name="notify")


def _prices(app: typer.Typer) -> None:
    from batchlab.cli import prices

    app.add_typer(prices.app, name="prices")


def _report(app: typer.Typer) -> None:
    from batchlab.cli import report, report_diff

    report.app.command("diff")(report_diff.diff)
    app.add_typer(report.app, name="report")


def _running(app: typer.Typer) -> None:
    from batchlab.cli import run

    run.register(app)


def _scenario(app: typer.Typer) -> None:
    from batchlab.cli import scenario

    app.add_typer(scenario.app, name="scenario")


def _schedule(app: typer.Typer) -> None:
    from batchlab.cli import schedule

    app.add_typer(schedule.app, name="schedule")


def _sim(app: typer.Typer) -> None:
    from batchlab.cli import sim

    app.add_typer(sim.app, name="sim")


class Listed(NamedTuple):
    """What adds a command, and the line that `batchlab --help` has of it."""

    add: Callable[[typer.Typer], None]
    about: str


LISTED = {
    "demo": Listed(_running, "See it work on made-up insurance claims."),
    "init": Listed(_running, "Write a first job of your own."),
    "run": Listed(_running, "Run a job file to its end and fetch its results."),
    "job": Listed(_job, "Submit jobs to a grid that is up, and look after them."),
    "schedule": Listed(_schedule, "Run jobs when they are due: once, or again and again."),
    "grid": Listed(_grid, "Bring a grid up, look at it, size it by hand, take it down."),
    "notify": Listed(_notify, "Look at whom the grid notifies, and at what came of it."),
    "deploy": Listed(_deploy, "Make, look at, change and end the stack on AWS."),
    "report": Listed(_report, "Ask what a job did: run times, waits, retries, scaling, cost."),
    "scenario": Listed(_scenario, "Rehearse a peak: check it, forecast it, replay it, judge it."),
    "cost": Listed(_cost, "Reckon what a run costs on AWS, in USD."),
    "prices": Listed(_prices, "Look at the price book, and take newer prices into it."),
    "ledger": Listed(_admin, "Repair the database that people and the planner read."),
    "schema": Listed(_admin, "Print the job file's JSON Schema, for editors."),
    "doctor": Listed(_admin, "Check that a grid can run here."),
    "gc": Listed(_admin, "Remove what grids that are gone have left, in Docker or on AWS."),
    "sim": Listed(_sim, "Try the grid's promises in simulated worlds full of faults."),
    "conform": Listed(_conform, "Check that an endpoint behaves as AWS's services do."),
    "asg": Listed(_asg, "Auto Scaling groups here, by AWS's own API."),
    "manager": Listed(_admin, "Run a manager (`grid up` and `run` do so)."),
    "worker": Listed(_admin, "Run a worker (the manager does so)."),
    "connect": Listed(_admin, "Keep a way to a manager on AWS open (`run` does so)."),
}
"""Every command, in the order in which a newcomer needs them."""


@cache
def _added(add: Callable[[typer.Typer], None]) -> dict[str, Any]:
    shelf = typer.Typer(add_completion=False, rich_markup_mode=None)
    add(shelf)
    return dict(get_group(shelf).commands)


class _Loaded(MutableMapping[str, Any]):
    """The commands by name, each made when it is asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _added(LISTED[name].add)[name]
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        yield from {**LISTED, **self._made}

    def __len__(self) -> int:
        return len({**LISTED, **self._made})


class _Commands(TyperGroup):
    """Lists its commands without having them made."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Loaded()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - as the base class has it
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not ctx.resilient_parsing:
            within = [one for one in self.commands if args[0] in _commands_of(self.commands[one])]
            if within:
                meant = " or ".join(f"'{one} {args[0]}'" for one in within)
                ctx.fail(f"No such command {args[0]!r}. Did you mean {meant}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from batchlab.cli.options import plainly

            if said := plainly(error):
                raise said from error
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - likewise
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.about) for name, one in LISTED.items()])


def _commands_of(command: Any) -> Collection[str]:
    return getattr(command, "commands", ())


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
            _show_traceback()
        output.complain(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if debug or lacking(error) is None:
            _unexpected(error, debug=debug)
        raise  # told by `main`, whichever import it was
    except Exception as error:  # noqa: BLE001 - the outermost place: told, and exit code 70
        _unexpected(error, debug=debug)


def _unexpected(error: Exception, *, debug: bool) -> NoReturn:
    if debug:
        _show_traceback()
    output.say(f"Error: something unexpected happened: {type(error).__name__}: {error}")
    if not debug:
        output.say("  The same command with --debug shows where.")
    sys.exit(UNEXPECTED)


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()
