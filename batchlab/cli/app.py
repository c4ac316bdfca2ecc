"""The root command `batchlab`, which imports the module of a subcommand on the first use of the subcommand.

Invariant: each BatchlabError is printed on stderr as a sentence and a remedy, and determines the exit code. For an
exception of another class, a traceback is printed only with --debug.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_group

from batchlab import __version__
from batchlab.cli import output
from batchlab.cli.startup import missing_module_message
from batchlab.core.errors import BatchlabError

UNEXPECTED = 70
"""Exit code of an unexpected error, equal to EX_SOFTWARE in sysexits.h. The outcomes of jobs have other exit codes."""

_OWN_DEBUG = "replay-task"
"""Name of the command that has its own --debug option."""


class Command(NamedTuple):
    """The module in `batchlab.cli` that registers a command, and the command's summary in `batchlab --help`."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("demo", "Run a demo job on generated insurance claims."),
    "init": Command("demo", "Write a job file, its code, and its input data as an example."),
    "run": Command("run", "Run a job file to its end and fetch its results."),
    "job": Command("job", "Submit jobs to a running grid, and manage the jobs."),
    "schedule": Command("schedule", "Run jobs on a schedule, once or repeatedly."),
    "grid": Command("grid", "Start, inspect, scale, and stop a grid."),
    "notify": Command("admin", "Show notification targets and sent notifications."),
    "deploy": Command("deploy", "Create, inspect, update, and delete the stack of a grid on AWS."),
    "report": Command("report", "Query run times, waits, retries, scaling, and cost of jobs."),
    "scenario": Command(
        "scenario", "Check, simulate, and replay load scenarios, and compare their runs with expectations."
    ),
    "cost": Command("cost", "Compute the cost of a job's run on AWS, in USD."),
    "prices": Command("cost", "Show and update the price book, which contains AWS's list prices."),
    "ledger": Command("admin", "Repair the database of the ledger, which contains the state of all jobs."),
    "schema": Command("admin", "Print the job file's JSON Schema, for editors."),
    "doctor": Command("doctor", "Check that a grid can run on this machine."),
    "gc": Command("admin", "Remove leftovers of deleted grids in Docker or on AWS."),
    "sim": Command("sim", "Test the grid's guarantees in simulation, with injected faults."),
    "conform": Command("endpoints", "Check that an endpoint follows the rules of AWS's services."),
    "asg": Command("endpoints", "Serve the API of AWS's Auto Scaling groups on this machine."),
    "manager": Command("admin", "Run a manager, which `grid up` and `run` normally start."),
    "worker": Command("admin", "Run a worker, which the manager normally starts."),
    "connect": Command("admin", "Keep open a connection to a manager on AWS, which `run` normally starts."),
}
"""All commands by name. A command that a new user needs earlier comes first."""


@cache
def _commands(module: str) -> dict[str, Any]:
    """Import a module of `batchlab.cli`, and return the commands and groups that the module registers."""
    parent = typer.Typer(add_completion=False, rich_markup_mode=None)
    parent.add_typer(import_module(f"batchlab.cli.{module}").app)
    return dict(get_group(parent).commands)


class _LazyCommands(MutableMapping[str, Any]):
    """Commands by name. The first access to a command imports the command's module."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _commands(COMMANDS[name].module)[name]
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from {**COMMANDS, **self._loaded}

    def __len__(self) -> int:
        return len({**COMMANDS, **self._loaded})


class _Commands(TyperGroup):
    """Typer group of the command `batchlab` that lists its subcommands without importing the subcommands' modules."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - signature of the base class
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not ctx.resilient_parsing:
            groups = [command for command in self.commands if args[0] in _subcommands(self.commands[command])]
            if groups:
                suggestions = " or ".join(f"'{group} {args[0]}'" for group in groups)
                ctx.fail(f"No such command {args[0]!r}. Did you mean {suggestions}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from batchlab.cli.option_values import number_error

            if usage_error := number_error(error):
                raise usage_error from error
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - signature of the base class
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


def _subcommands(command: Any) -> Collection[str]:
    return getattr(command, "commands", ())


def _version(wanted: bool) -> None:
    if wanted:
        output.show(f"batchlab {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="batchlab",
    cls=_Commands,
    no_args_is_help=True,
    # Help texts are printed without the package rich, because the import of rich takes longer than the rest of a
    # command.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(
    epilog="Exit codes: 0 success, 1 the job failed, 2 wrong usage, 3 the grid or its backend "
    "cannot be reached, 130 interrupted."
)
def batchlab(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an unexpected error."),
) -> None:
    """Run batch jobs on a grid of workers: on this machine, in a simulator, or on AWS.

    \b
    New here?   batchlab demo
    Your own:   batchlab init first && batchlab run first/job.yaml
    """


def start(arguments: Sequence[str]) -> None:
    """Run one command line, and exit the process with the command's exit code."""
    output.install_signal_handlers()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    if _OWN_DEBUG in arguments[:end]:
        end = list(arguments).index(_OWN_DEBUG)  # A --debug after `replay-task` is an option of `replay-task`.
    remaining = [one for i, one in enumerate(arguments) if one != "--debug" or i > end]
    try:
        app(remaining, prog_name="batchlab")
    except BatchlabError as error:
        if debug:
            _show_traceback()
        output.show_error(error)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if debug or missing_module_message(error) is None:
            _exit_unexpected(error, debug=debug)
        raise  # `cli.main` prints the message about the missing module.
    except Exception as error:  # noqa: BLE001 - outermost handler: print the error, exit code 70
        _exit_unexpected(error, debug=debug)


def _exit_unexpected(error: Exception, *, debug: bool) -> NoReturn:
    if debug:
        _show_traceback()
    output.say(f"Error: something unexpected happened: {type(error).__name__}: {error}")
    if not debug:
        output.say("  The same command with --debug shows where.")
    sys.exit(UNEXPECTED)


def _show_traceback() -> None:
    traceback.print_exc()
