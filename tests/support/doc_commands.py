"""Every command that the docs show, and a shell that runs commands in this process.

Invariant: a command is one line of an `sh` block without its comment, or an indented line that starts a program of the
project. A command of several lines (a `\\` at the end, a function, a here-document) is identified by its first line.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchlab.cli import app
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("examples/*/*.md")]

_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.S | re.M)
_FENCED = re.compile(r"^```.*?^```", re.S | re.M)
_INDENTED = re.compile(r"^    ((?:[A-Z_]+=\S+ )?(?:python|batchlab) .*)", re.M)
_INTO = re.compile(r" > ([\w./-]+)$")
_OPENS = re.compile(r"\(\) \{$|<<'(\w+)'$")


def written() -> Iterator[tuple[str, str]]:
    """Yield each page and command of the docs, in order."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        text = page.read_text()
        for block in [*_BLOCK.findall(text), *_INDENTED.findall(_FENCED.sub("", text))]:
            yield from ((name, command) for command in commands(block))


def commands(block: str) -> Iterator[str]:
    lines = iter(block.replace("\\\n", " ").splitlines())
    for line in lines:
        command = " ".join(re.sub(r"(?:^|\s+)# .*", "", line).split())
        if not command:
            continue
        yield command
        if opened := _OPENS.search(line):
            end = opened[1] or "}"
            while next(lines) != end:
                pass


@dataclass(frozen=True, slots=True)
class Line:
    """Commands of the docs, the command that the test runs for them, and its allowed exit codes."""

    told: tuple[str, ...]
    given: str
    exits: tuple[int, ...] = (0,)


def lines(script: str) -> Iterator[Line]:
    """Parse a script of commands. A line is a command of the docs, and ` => ` separates the command from its
    replacement in the test. One replacement may stand for several commands, separated by ` ;; `. The mark `+ ` begins a
    command that is not in the docs and prepares for the next ones. The mark `! ` means exit code 1, and the mark `? `
    means exit code 0 or 1."""
    for line in script.splitlines():
        if not line.strip():
            continue
        mark = line[:2] if line[:2] in ("! ", "? ", "+ ") else ""
        told, _, given = line.removeprefix(mark).partition(" => ")
        exits = {"! ": (1,), "? ": (0, 1)}.get(mark, (0,))
        yield Line(() if mark == "+ " else tuple(told.split(" ;; ")), given or told, exits)


class Shell:
    """A shell that runs commands in `folder`. Commands of batchlab run in this process, which is much faster."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "100")
        for name in ("BATCHLAB_HOME", "DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("batchlab.cli.output.install_signal_handlers", lambda: None)

    def follow(self, script: str, **words: str) -> None:
        """Run all lines of a script. `{name}` is replaced by the value of `name` in `words`."""
        for line in lines(script):
            self.give(line, words)

    def give(self, line: Line, words: Mapping[str, str] = {}) -> str:
        """Run a command, check its exit code, and return its output."""
        given = line.given
        for name, word in words.items():
            given = given.replace(f"{{{name}}}", word)
        command, _, aside = given.partition(" || ")
        if into := _INTO.search(command):
            command = command[: into.start()]
        code, out, err = self.run(shlex.split(command))
        assert code in (*line.exits, *((1,) if aside else ())), f"{given}: {code}\n{out}\n{err}"
        if into:
            Path(self.folder, into[1]).write_text(out)
        return out

    def run(self, argv: list[str]) -> tuple[int, str, str]:
        if argv[0] != "batchlab":
            done = subprocess.run(argv, cwd=self.folder, capture_output=True, text=True)
            return done.returncode, done.stdout, done.stderr
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            app.start(argv[1:])
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out.getvalue(), err.getvalue()
