"""The commands of a page of the docs, run as a reader would run them, and compared with the output on the page.

Comments in a page control the run. Most of these comments are invisible in the rendered page:

    <!-- file: NAME -->          the next block is a file that the reader saves under that name
    <!-- not run: WHY -->        the next block of commands is not run; in the visible form,
                                 `*Not run by a test: WHY*`
    <!-- exits with CODE -->     the next block of commands exits with CODE; the default is 0

A block of text after a block of commands is the output of these commands. A line `…` in the output stands for
any number of lines. Values that differ between runs (ids, times, durations, sizes) are not compared.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT, forked_cli

PLACE = "/home/you/work"
"""The folder in which a reader runs the commands, as written in the docs."""
LONGEST_S = 120.0

_BLOCK = re.compile(
    r"(?:(?:<!-- |\*)(?P<word>file|not run|Not run by a test|exits with):? (?P<told>[^\n]*?)"
    r"(?: -->|\*)\n\n?)?"
    r"```(?P<kind>[a-z]+)[^\n]*\n(?P<text>.*?)```\n",
    re.S,
)
_PLAIN = re.compile(r"batchlab [^|&;<>$`(){}*?#\\\\~]*")
"""A command of batchlab without a feature of the shell, except quotes."""
_UNITS = r"(?:ms|s|min|h|B|KiB|MiB|GiB|USD|%)"
_VARIES = (
    re.compile(r"\b\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d)?Z?)?"),
    re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{8,16}\b"),
    re.compile(rf"(?:<|-?\b)\d[\d.,]* ?{_UNITS}(?![\w])(?: \d+ {_UNITS}(?![\w]))?"),
    re.compile(r"[+-]?\b\d+\.\d+\b"),
    re.compile(r"127\.0\.0\.1:\d+"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One block of a page: a `file` to save, or commands to run. `prints` is the expected output, or None if the page
    does not show the output."""

    text: str
    file: str = ""
    exits: int = 0
    prints: str | None = None
    not_run: str = ""


def steps(page: str) -> Iterator[Step]:
    """Yield the steps that a reader of the Markdown text `page` does, in order."""
    found = list(_BLOCK.finditer(page))
    for number, one in enumerate(found):
        word, told, text = (one["word"] or "").lower(), one["told"], one["text"]
        if word == "file":
            yield Step(text, file=told)
        elif one["kind"] == "sh":
            after = found[number + 1] if number + 1 < len(found) else None
            prints = None
            if after is not None and after["kind"] == "text" and not after["word"]:
                prints = after["text"]
            yield Step(
                text,
                exits=int(told) if word == "exits with" else 0,
                prints=prints,
                not_run=told if word.startswith("not run") else "",
            )


class Reader:
    """A reader that follows a page in `folder`, with the `batchlab` of this checkout and without the caller's
    settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        program = programs / "batchlab"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m batchlab "$@"\n')
        program.chmod(0o755)
        self._environment = {
            **{name: value for name, value in os.environ.items() if "BATCHLAB" not in name},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def save(self, step: Step) -> None:
        path = self.folder / step.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(step.text)

    def run(self, commands: str) -> tuple[int, str]:
        """Run commands, and return the exit code and the output. The page's folder name replaces the real folder."""
        lines = commands.splitlines()
        if all(_PLAIN.fullmatch(line) for line in lines):
            code, output = self._run_forks(lines)
        else:
            code, output = self._run_shell(commands)
        return code, output.replace(str(self.folder), PLACE)

    def _run_forks(self, lines: Sequence[str]) -> tuple[int, str]:
        """Run commands of batchlab one by one until one fails."""
        output = ""
        for line in lines:
            arguments = shlex.split(line)[1:]
            told = forked_cli.run(arguments, self._environment, LONGEST_S, folder=self.folder, is_merged=True)
            output += told.out
            if told.code:
                return told.code, output
        return 0, output

    def _run_shell(self, commands: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
        )
        return done.returncode, done.stdout


def masked(line: str) -> str:
    """Return a line without the values that differ between runs."""
    for pattern in _VARIES:
        line = pattern.sub("#", line)
    return " ".join(line.split())


def agrees(told: str, printed: str) -> bool:
    """Return whether the output matches the block of a page."""
    left = [masked(line) for line in printed.splitlines()]
    parts: list[list[str]] = [[]]
    for line in told.splitlines():
        if line.strip() == "…":
            parts.append([])
        else:
            parts[-1].append(masked(line))
    if len(parts) == 1:
        return parts[0] == left
    if left[: len(parts[0])] != parts[0]:
        return False
    left = left[len(parts[0]) :]
    last = parts.pop()
    for part in parts[1:]:
        found = [n for n in range(len(left)) if left[n : n + len(part)] == part]
        if not found:
            return False
        left = left[found[0] + len(part) :]
    return not last or left[-len(last) :] == last
