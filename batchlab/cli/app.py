"""The root command `batchlab`, which imports the module of a subcommand on the first use of the subcommand.

Invariant: each BatchlabError is printed on stderr as a sentence and a remedy, and determines the exit code. For an
exception of another class, a traceback is printed only with --debug.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, MutableMapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import typer
from typer.main import get_group

from batchlab import __version__
from batchlab.cli import output
from batchlab.cli.groups import Group, example
from batchlab.cli.startup import missing_module_message
from batchlab.core.errors import BatchlabError

UNEXPECTED = 70
"""Exit code of an unexpected error, equal to EX_SOFTWARE in sysexits.h. The outcomes of jobs have other exit codes."""

_OWN_DEBUG = "replay-task"
"""Name of the command that has its own --debug option."""


class Command(NamedTuple):
    """The module in `batchlab.cli` that registers a command, and the command's panel and summary in `batchlab --help`.

    A command without a panel is hidden.
    """

    module: str
    panel: str
    summary: str


_START, _JOBS, _PEAKS, _GRID, _CHECKS = PANELS = (
    "Start",
    "Jobs",
    "Peaks",
    "Operate a grid",
    "Check batchlab and its services",
)

COMMANDS = {
    "demo": Command("demo", _START, "Run a demo job on generated insurance claims."),
    "init": Command("demo", _START, "Write a job file, its code, and its input data as an example."),
    "run": Command("run", _START, "Run a job file to its end and fetch its results."),
    "doctor": Command("doctor", _START, "Check that a grid can run on this machine."),
    "job": Command("job", _JOBS, "Submit jobs to a running grid, and inspect, control, and delete jobs."),
    "schedule": Command("schedule", _JOBS, "Run jobs on a schedule, once or repeatedly."),
    "report": Command("report", _JOBS, "Query run times, waits, retries, scaling, and cost of jobs."),
    "cost": Command("cost", _JOBS, "Compute the cost of a job's run on AWS, and show AWS's prices."),
    "schema": Command("admin", _JOBS, "Print the JSON Schema of job files or of scenario files, for editors."),
    "scenario": Command(
        "scenario", _PEAKS, "Check, simulate, and replay load scenarios, and compare their runs with expectations."
    ),
    "grid": Command("grid", _GRID, "Start, inspect, scale, and stop a grid."),
    "share": Command("share", _GRID, "Set and show the fair-share policy, which divides pools among shares of jobs."),
    "user": Command("users", _GRID, "Add, list, change, and revoke users, who have tokens and limited permissions."),
    "audit": Command("users", _GRID, "List the changes that users requested, and the refused requests."),
    "notify": Command("admin", _GRID, "Show notification targets and sent notifications."),
    "deploy": Command("deploy", _GRID, "Create, inspect, update, and delete the stack of a grid on AWS."),
    "gc": Command("admin", _GRID, "Remove leftovers of deleted grids on this machine or on AWS."),
    "sim": Command("sim", _CHECKS, "Test the grid's guarantees in simulation, with injected faults."),
    "conform": Command("endpoints", _CHECKS, "Check that an endpoint follows the rules of AWS's services."),
    "asg": Command("endpoints", _CHECKS, "Serve the API of AWS's Auto Scaling groups on this machine."),
    "manager": Command("admin", "", "Run a manager, which `grid up` and `run` normally start."),
    "worker": Command("admin", "", "Run a worker, which the manager normally starts."),
    "connect": Command("admin", "", "Keep open a connection to a manager on AWS, which `run` normally starts."),
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


class _Commands(Group):
    """Typer group of the command `batchlab` that lists its subcommands without importing the subcommands' modules."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - signature of the base class
        return list(self.commands)

    def meanings(self, word: str) -> Iterator[str]:
        groups = {name: group for name in self.commands if isinstance(group := self.commands[name], Group)}
        if same := [name for name, group in groups.items() if word in group.commands]:
            yield from (f"{name} {word}" for name in same)
        else:
            yield from (f"{name} {meaning}" for name, group in groups.items() for meaning in group.meanings(word))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from batchlab.cli.option_values import value_error

            if usage_error := value_error(error):
                raise usage_error from error
            if hasattr(error, "param_type"):  # the exception of Typer for a missing argument or option
                _add_example(error)
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - signature of the base class
        for panel in PANELS:
            with formatter.section(panel):
                formatter.write_dl([(name, one.summary) for name, one in COMMANDS.items() if one.panel == panel])


def _add_example(error: Any) -> None:
    """Add the example of the command to the message about a missing argument or option."""
    if error.ctx and (text := example(error.ctx.command)):
        error.message = f"Example: {text}"


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
    context_settings={"help_option_names": ["--help", "-h"]},
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
