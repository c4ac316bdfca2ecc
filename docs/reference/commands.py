"""The reference of the commands, from the commands themselves.

Invariant: every command that `batchlab --help` leads to is in it, with each of its options.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from docs.reference.markdown import head, table, text

_WORDS = """\

# Commands

This page contains the output of `batchlab COMMAND --help` for all commands.

- `--json` prints the output as JSON, for programs.
- `--home DIR` is the grid's folder. The default is the folder that `BATCHLAB_HOME` names, or
  `.batchlab` in the current folder.
- `JOB` is a job's id, the beginning of a job's id, or `last` for the newest job.
- The exit code is 0 after a success, 1 if the job failed (or a verdict is red, or a gate failed), 2
  for wrong usage, 3 if the grid or its backend does not answer, and 130 after an interruption.

"""


_FORMS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


def reference() -> str:
    """The page in Markdown."""
    from batchlab.cli.app import app
    from batchlab.cli.services import parsers

    services = parsers()[1]
    root = get_command(app)
    found = list(_walk(root, ("batchlab",)))
    rows = [(f"[`{' '.join(path)}`](#{_anchor(path)})", text(_first(one))) for path, one in found]
    pages = [head("the commands"), _WORDS, table(("command", "effect"), rows)]
    for path, command in found:
        service = services.get(path[-1]) if len(path) == 2 else None
        usage = ["[OPTIONS]"] if service else _usage(command)
        pages.append(f"\n## {' '.join(path)}\n\n{_words(command.help or '')}")
        pages.append(f"\n```text\n{' '.join((*path, *usage))}\n```\n")
        told = [_parameter(one) for one in command.params if _is_shown(one)]
        if told := told + (list(_of_service(service)) if service else []):
            pages.append("\n" + table(("", "default", "meaning"), told))
    return "".join(pages)


def _of_service(service: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """The options of a service, whose command line Typer does not read."""
    for one in service._actions:
        if "--help" in one.option_strings:
            continue
        form = "|".join(one.choices or ()) or one.metavar or _FORMS.get(one.type) or "TEXT"
        shown = ", ".join(f"`{name} {form}`" for name in one.option_strings)
        meaning = one.help or ""
        yield (shown, f"`{one.default}`" if one.default else "", text(f"{meaning[:1].upper()}{meaning[1:]}."))


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name in command.list_commands(None):
        yield from _walk(command.commands[name], (*path, name))


def _anchor(path: tuple[str, ...]) -> str:
    return "-".join(path)


def _first(command: Any) -> str:
    """The first sentence of its help."""
    paragraph = " ".join((command.help or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def _words(help_: str) -> str:
    """Paragraphs; those that are laid out by hand are code."""
    shown = []
    for paragraph in help_.split("\n\n"):
        if paragraph.startswith("\b"):
            lines = paragraph.removeprefix("\b").strip("\n")
            shown.append(f"```text\n{lines}\n```\n")
        else:
            shown.append(text(" ".join(paragraph.split())) + "\n")
    return "\n".join(shown)


def _usage(command: Any) -> list[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    words = ["[OPTIONS]"] if len(arguments) < len(command.params) else []
    for one in arguments:
        name = f"{_name(one)}…" if one.nargs == -1 else _name(one)
        words.append(name if one.required else f"[{name}]")
    return words


def _name(argument: Any) -> str:
    return str(argument.metavar or argument.name).strip("{}[].").upper()


def _is_shown(parameter: Any) -> bool:
    return not getattr(parameter, "hidden", False) and "--help" not in parameter.opts


def _parameter(one: Any) -> tuple[str, str, str]:
    if one.param_type_name == "argument":
        return f"`{_name(one)}`", "required" if one.required else "", text(one.help or "")
    names = [*one.opts, *one.secondary_opts]
    form = "" if one.is_flag else f" {one.metavar or _form(one)}"
    shown = ", ".join(f"`{name}{form}`" for name in names)
    return shown, "required" if one.required else _default(one), text(one.help or "")


def _form(option: Any) -> str:
    return _FORMS.get(option.type_descriptor.annotation, "TEXT")


def _default(option: Any) -> str:
    default = option.default
    if option.is_flag or option.multiple or callable(default) or default in (None, ""):
        return ""
    if option.show_default is False:
        return ""
    return f"`{getattr(default, 'value', default)}`"
