"""Groups of commands: help with whole summaries, and suggestions for old and for guessed names of commands.

Invariant: an unknown command ends with exit code 2 and one sentence. If the command was renamed, or if a user of
another tool would guess the command's name, the sentence has the name that exists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

RENAMED = {
    "completion": "--install-completion",
    "help": "--help",
    "job show-task": "job show JOB TASK",
    "ledger": "grid rebuild-ledger",
    "ledger rebuild": "grid rebuild-ledger",
    "prices": "cost prices",
    "prices refresh": "cost refresh-prices",
    "prices show": "cost prices",
    "report queries": "report query",
    "report sql": "report query SQL",
    "scenario schema": "schema scenario",
    "schedule next": "schedule show",
    "sim faults": "scenario faults --simulator",
    "version": "--version",
}
"""Commands of release 0.1.0 with another name now, and words that are not commands, with the command for each."""

GUESSES = {
    "abort": ("cancel",),
    "create": ("add", "up", "apply", "submit"),
    "delete": ("down", "destroy", "revoke"),
    "describe": ("show", "status"),
    "disable": ("pause",),
    "enable": ("resume",),
    "get": ("show", "status"),
    "info": ("show", "status"),
    "kill": ("cancel", "down"),
    "list": ("status",),
    "ls": ("list", "status"),
    "ps": ("list", "workers"),
    "remove": ("delete", "down", "destroy", "revoke"),
    "rm": ("delete", "down", "destroy", "revoke"),
    "show": ("status",),
    "start": ("up", "submit", "resume"),
    "status": ("show",),
    "stop": ("cancel", "down", "pause"),
    "terminate": ("cancel", "down"),
}
"""Words that users of the AWS CLI, Docker, and kubectl try, with the commands of batchlab that they may mean. The first
command that a group has is the meaning of the word in the group."""


class Group(TyperGroup):
    """Group of commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not ctx.resilient_parsing:
            path = ctx.command_path.split()[1:]
            names = [" ".join([*path, *args[:2]]), " ".join([*path, args[0]])]
            new_names = [RENAMED[name] for name in names if name in RENAMED][:1]
            if suggestions := new_names or [" ".join([*path, name]) for name in self.meanings(args[0])]:
                text = " or ".join(f"'batchlab {suggestion}'" for suggestion in suggestions)
                ctx.fail(f"No such command {args[0]!r}. Did you mean {text}?")
        return super().resolve_command(ctx, args)

    def meanings(self, word: str) -> Iterator[str]:
        """Yield the commands of the group that `word`, which is not a command, may mean."""
        yield from [name for name in GUESSES.get(word, ()) if name in self.commands][:1]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary(one)) for name, one in commands if one and not one.hidden])


class Command(TyperCommand):
    """Command whose usage line shows a required argument as JOB. Typer would show {JOB}."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [_REQUIRED.sub(r"\1", piece) for piece in super().collect_usage_pieces(ctx)]


_REQUIRED = re.compile(r"^\{(.*)\}")
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Commands(typer.Typer):
    """Commands of a module, which are instances of Command."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Function], _Function]:
        return super().command(name, **{"cls": Command, **settings})


def command_group(name: str) -> Commands:
    """Return a new group of commands with the name `name`."""
    return Commands(name=name, cls=Group, no_args_is_help=True)


def example(command: Any) -> str:
    """Return the example in a command's help, or ""."""
    match = re.search(r"^\s*Example: (.+)$", command.help or "", re.MULTILINE)
    return match[1] if match else ""


def summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]
