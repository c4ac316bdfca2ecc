"""The reference of the commands, from the commands themselves: an index, and a page for each part of the commands.

Invariant: every command that `batchlab --help` leads to is on one page. Each of its options is in the command's
section, or else among the shared options of the page or the common options of the index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from typer.main import get_command

from batchlab.cli.groups import summary
from docs.reference.markdown import head, table, text

_WORDS = """\

# Commands

`batchlab COMMAND --help` prints the help of a command. The exit code is 0 after a success, 1 if the job failed (or a
verdict is red, or a gate failed), 2 for wrong usage, 3 if the grid or its backend does not answer, and 130 after an
interruption.

"""
_COMMON = """
## Common options

The following arguments and options have the same meaning in all commands. Commands that use a grid have `--home`, and
commands with results have `--json`. The line *Common* of a command lists its other options from this table.

"""
_SHARED = """
## Shared options

Several commands of this page have the following options. The line *Shared* of a command lists them.

"""
_EVERYWHERE = ("--home", "--json")
"""Common options that most commands have, so the pages do not repeat their names."""

PAGES = {
    "index": ("demo", "init", "run", "doctor", "schema", "gc"),
    "jobs": ("job", "schedule"),
    "reports": ("report",),
    "scenarios": ("scenario",),
    "grid": ("grid", "share", "user", "audit", "notify"),
    "aws": ("deploy", "cost"),
    "tools": ("sim", "conform", "asg"),
}
"""Commands of `batchlab` on each page."""
_TITLES = {
    "jobs": "Commands for jobs and schedules",
    "reports": "Commands for reports",
    "scenarios": "Commands for scenarios",
    "grid": "Commands for grids and notifications",
    "aws": "Commands for stacks on AWS and costs",
    "tools": "Commands for checks of batchlab and its services",
}
Row = tuple[str, str, str]
"""Name, default, and meaning of an argument or an option."""

_FORMS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


def pages() -> Mapping[str, Callable[[], str]]:
    """Return the generator of each page, by the page's path below `docs`."""
    return {f"cli/{name}.md": partial(_page, name) if name in _TITLES else _index for name in PAGES}


def _index() -> str:
    rows = []
    for name in PAGES:
        where = "" if name == "index" else f"{name}.md"
        rows += [(f"[`{' '.join(path[1:])}`]({where}#{_anchor(path)})", text(summary(one))) for path, one in _on(name)]
    parts = (head("the commands"), _WORDS, table(("command", "effect"), rows), _COMMON, _options(_common().values()))
    return "".join((*parts, *_sections("index")))


def _page(name: str) -> str:
    shared = _shared(name).values()
    parts = (head("the commands"), f"\n# {_TITLES[name]}\n", *((_SHARED, _options(shared)) if shared else ()))
    return "".join((*parts, *_sections(name)))


def _sections(name: str) -> Iterator[str]:
    for path, command in _on(name):
        arguments = _arguments(command)
        usage = f"Usage:   {' '.join((*path, *arguments))}\n" if arguments else ""
        yield f"\n## {' '.join(path)}\n\n{_words(command.help or '', usage)}"
        rows = _rows(command)
        common = [row for row in rows if row in _common().values()]
        shared = [row for row in rows if row in _shared(name).values()]
        lists = []
        for title, target, found in (
            ("Common", "#common-options" if name == "index" else "index.md#common-options", common),
            ("Shared", "#shared-options", shared),
        ):
            options = [f"`{_key(row)}`" for row in found if _key(row).startswith("--") and _key(row) not in _EVERYWHERE]
            lists += [f"[{title}]({target}): {', '.join(options)}."] if options else []
        if lists:
            yield f"\n{' '.join(lists)}\n"
        if own := [row for row in rows if row not in common and row not in shared]:
            yield "\n" + _options(own)


def _options(rows: Iterable[Row]) -> str:
    return table(("", "default", "meaning"), rows)


def _key(row: Row) -> str:
    return row[0].strip("`").split()[0].rstrip("`,")


@cache
def _common() -> Mapping[str, Row]:
    """Return the arguments and options that several pages have, by name, sorted."""
    return _most_used(Counter(row for name in PAGES for row in {row for _, one in _on(name) for row in _rows(one)}))


@cache
def _shared(name: str) -> Mapping[str, Row]:
    """Return the other arguments and options that several commands of one page have, by name, sorted."""
    if name == "index":
        return {}
    common = _common().values()
    return _most_used(Counter(row for _, one in _on(name) for row in _rows(one) if row not in common))


def _most_used(counts: Counter[Row]) -> Mapping[str, Row]:
    rows: dict[str, Row] = {}
    for row, count in counts.most_common():
        if count > 1:
            rows.setdefault(_key(row), row)  # Another option with the same name stays in the tables of its commands.
    return dict(sorted(rows.items()))


def _rows(command: Any) -> list[Row]:
    return [_parameter(one) for one in command.params if _is_shown(one)]


@cache
def _on(page: str) -> list[tuple[tuple[str, ...], Any]]:
    """Return the commands on a page, with the words that start each command."""
    from batchlab.cli.app import app

    root: Any = get_command(app)
    return [found for name in PAGES[page] for found in _walk(root.commands[name], ("batchlab", name))]


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, one in command.commands.items():
        if not one.hidden:
            yield from _walk(one, (*path, name))


def _anchor(path: tuple[str, ...]) -> str:
    return "-".join(path)


def _words(help_: str, usage: str) -> str:
    """Paragraphs; those that are laid out by hand are code, which begins with the usage."""
    shown = []
    for paragraph in help_.split("\n\n"):
        if paragraph.startswith("\b"):
            lines = paragraph.removeprefix("\b").strip("\n")
            shown.append(f"```text\n{usage}{lines}\n```\n")
        else:
            shown.append(text(" ".join(paragraph.split())) + "\n")
    return "\n".join(shown)


def _arguments(command: Any) -> list[str]:
    words = []
    for one in command.params:
        if one.param_type_name == "argument":
            name = f"{_name(one)}…" if one.nargs == -1 else _name(one)
            words.append(name if one.required else f"[{name}]")
    return words


def _name(argument: Any) -> str:
    name = str(argument.metavar or argument.name).strip("{}[].")
    return name if "|" in name else name.upper()  # Values such as job|scenario are in lower case.


def _is_shown(parameter: Any) -> bool:
    return not getattr(parameter, "hidden", False) and "--help" not in parameter.opts


def _parameter(one: Any) -> Row:
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
