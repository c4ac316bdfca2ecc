"""YAML text as plain data with the line of each key and value, and errors with line numbers.

Invariants: a YAML text cannot run code, expand without a limit, or overwrite a key silently. YAML tags, nested aliases
that multiply the text, and repeated keys are refused. Scalars follow YAML 1.2, so `on` and a date are text. Each
mistake is reported as one sentence with its line and a remedy, and all mistakes are reported together. The read of a
file always ends, even if the path is a device or a pipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from batchlab.core.errors import JobFileError
from batchlab.core.model import Json

Loc = tuple[str | int, ...]
"""Location in a YAML document: the keys and list indices on the way from the root."""


def is_any_of(loc: Loc, places: Collection[Loc]) -> bool:
    """Return whether the location `loc` matches one of `places`. "*" in a place matches any index or key."""
    return any(
        len(loc) == len(place) and all(b in (a, "*") for a, b in zip(loc, place, strict=True)) for place in places
    )


@dataclass(frozen=True, slots=True)
class Problem:
    """Mistake in a job file or on the command line.

    The error names the line of the value, or with `at_key` the line of the key. `loc` is None for a mistake on the
    command line.
    """

    loc: Loc | None
    message: str
    remedy: str
    at_key: bool = False


class JobFileErrors(JobFileError):
    """Error with all mistakes of a file in the order of their lines.

    The file, line, and remedy of the error are the file, line, and remedy of the first mistake.
    """

    def __init__(self, errors: Sequence[JobFileError]) -> None:
        first = errors[0]
        super().__init__(first.message, file=first.file, line=first.line, remedy=first.remedy)
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(e) for e in self.errors)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that is most similar to `name`, or None if none of the names is similar."""
    matches_found = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches_found[0] if matches_found else None


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """Return a remedy for an unknown name: the most similar known name, or a list of all known names."""
    names = list(known)
    close = nearest(name, names)
    if close is not None:
        return f"Did you mean '{close}'?"
    return f"Write one of the {what}: {', '.join(names)}." if names else f"There are no {what}."


MAX_CHARACTERS = 1024 * 1024
_MAX_VALUES = 100_000
_MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_TEXTS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "merge"))
_TRUTH_OF_YAML_1_1 = {"yes": "true", "on": "true", "no": "false", "off": "false"}


class _Loader(yaml.SafeLoader):
    pass


# PyYAML follows YAML 1.1, in which `on` as a key means true and 1:30 is the number 90.
_Loader.yaml_implicit_resolvers = {}
for _name, _regex, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    yaml.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_regex})$"), list(_first), Loader=_Loader)


class ScalarRefused(ValueError):
    """Error for an ambiguous or invalid YAML scalar. `remedy` suggests another text for the scalar."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class _TooMuch(Exception):
    """Error for a text with too many values or too many levels, for example through aliases."""


@dataclass(slots=True)
class Document:
    """Parsed YAML document. `data` is the plain data, and `problems` are the problems that the parser found."""

    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    lines: dict[Loc, tuple[int, int]] = field(default_factory=dict)
    """Line of the key and line of the value for each location."""

    def line(self, problem: Problem) -> int | None:
        """Return the line of a problem.

        If the location of the problem is not in the text, return the line of the nearest parent of the location.
        """
        if problem.loc is None:
            return None
        parent: Loc = ()
        for part in problem.loc:
            if (*parent, part) in self.lines:
                parent = (*parent, part)
        whole = len(parent) == len(problem.loc)
        lines = self.lines.get(parent)
        return lines[0 if problem.at_key or not whole else 1] if lines else None


def parse(text: str, is_text: Callable[[Loc], bool]) -> Document:
    """Parse `text`, which contains a single YAML document.

    If `is_text` returns true for a location, the scalar at the location stays text. For example, 1.50 in a command is
    text.
    """
    document = Document()
    if len(text) > MAX_CHARACTERS:
        limit = f"It is longer than {MAX_CHARACTERS} characters."
        document.problems.append(Problem((), limit, "Move long content into separate files."))
        return document
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            document.lines[()] = (1, 1)
            document.data = _Reader(document, is_text).value(root, ())
    except yaml.YAMLError as error:
        document.problems.append(_syntax(document, error, text))
    except (_TooMuch, RecursionError):
        limit = f"It holds more than {_MAX_VALUES} values or is nested deeper than {_MAX_DEPTH}."
        document.problems.append(Problem((), limit, "Write it without aliases of aliases."))
    return document


def scalar(text: str) -> Json:
    """Return the value of `text` as one YAML scalar, or `text` itself if the text is not valid YAML.

    Raise ScalarRefused for a list or mapping, and for words that YAML 1.1 reads as true or false.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return plain_text(text)
    if node is None:
        return ""
    if isinstance(node, ScalarNode):
        return _scalar(node)
    raise ScalarRefused("It is a list or a mapping.", f"Write it in quotes as text: '\"{text}\"'.")


def plain_text(text: str) -> str:
    """Return `text`. Raise ScalarRefused if UTF-8 or a command line cannot represent the text."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ScalarRefused("It contains a character that text must not contain.", "Write it without.")
    return text


def _syntax(document: Document, error: yaml.YAMLError, text: str) -> Problem:
    loc: Loc = ("",)
    mark = getattr(error, "problem_mark", None)
    position = getattr(error, "position", 0)
    line = mark.line + 1 if mark else text.count("\n", 0, position) + 1
    document.lines[loc] = (line, line)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    remedy = "Indent with spaces, and quote text that has a colon or begins with a sign."
    return Problem(loc, f"This is not YAML: {what}.", remedy)


def _scalar(node: ScalarNode) -> Json:
    text = plain_text(node.value)
    if node.tag == _TAG + "str":
        truth = _TRUTH_OF_YAML_1_1.get(text.lower()) if node.style is None else None
        if truth:
            raise ScalarRefused(
                f"{text} is text in YAML 1.2 but {truth} in YAML 1.1.", f"Write {truth}, or '{text}' in quotes."
            )
        return text
    if node.tag == _TAG + "null":
        return None
    if node.tag == _TAG + "bool":
        return text.lower() == "true"
    try:
        if node.tag == _TAG + "int":
            # Use int(text) for decimal numbers, because int(text, 0) refuses leading zeros, which YAML 1.2 permits.
            whole = int(text, 0) if text.startswith(("0o", "0x")) else int(text)
            str(whole)  # str() raises ValueError for more digits than Python can print
            return whole
        number = float(text) if node.tag == _TAG + "float" else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        what = f"{_clip(text)} is not a valid value here."
        raise ScalarRefused(what, "Write it in quotes as text.")
    return number


def _clip(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}…"


class _Reader:
    def __init__(self, document: Document, is_text: Callable[[Loc], bool]) -> None:
        self._document = document
        self._is_text = is_text
        self._values = 0

    def value(self, node: Node, loc: Loc) -> Json:
        self._values += 1
        if self._values > _MAX_VALUES or len(loc) > _MAX_DEPTH:
            raise _TooMuch
        if isinstance(node, ScalarNode) and node.tag in {*_TEXTS, _TAG + "null"}:
            return self._scalar(node, loc)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self._child(loc, i, None, child) for i, child in enumerate(node.value)]
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            pairs = self._pairs(node, loc)
            return {key: self._child(loc, key, at, child) for key, (at, child) in pairs.items()}
        self._refuse(loc, f"The tag {_clip(node.tag)} has no meaning here.", "Delete the tag.")
        return None

    def _child(self, loc: Loc, name: str | int, key: Node | None, node: Node) -> Json:
        line = node.start_mark.line + 1
        self._document.lines[(*loc, name)] = (key.start_mark.line + 1 if key else line, line)
        return self.value(node, (*loc, name))

    def _scalar(self, node: ScalarNode, loc: Loc) -> Json:
        try:
            as_text = self._is_text(loc) and node.tag in _TEXTS
            return plain_text(node.value) if as_text else _scalar(node)
        except ScalarRefused as refused:
            self._refuse(loc, str(refused), refused.remedy)
            return None

    def _pairs(self, node: MappingNode, loc: Loc) -> dict[str, tuple[Node, Node]]:
        """Return the keys of a mapping with their nodes.

        A mapping's own keys override the keys of merged mappings, and the keys of earlier merged mappings override the
        keys of later ones.
        """
        self._values += len(node.value)
        if self._values > _MAX_VALUES:
            raise _TooMuch
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for key, child in node.value:
            if key.tag == _TAG + "merge":
                for source in self._merged_nodes(child, loc):
                    merged = {**self._pairs(source, loc), **merged}
            elif not isinstance(key, ScalarNode) or not key.value.isprintable():
                self._document.lines[(*loc, "?")] = (key.start_mark.line + 1,) * 2
                self._refuse((*loc, "?"), "A key must be a word.", "Write a word before the colon.")
            elif key.value in own:
                first = own[key.value][0].start_mark.line + 1
                again = (*loc, key.value, "again")
                self._document.lines[(*loc, key.value)] = (first, first)
                self._document.lines[again] = (key.start_mark.line + 1,) * 2
                message = f"'{_clip(key.value)}' is already on line {first}."
                self._refuse(again, message, "Delete one of the two.")
            else:
                own[key.value] = (key, child)
        return {**merged, **own}

    def _merged_nodes(self, node: Node, loc: Loc) -> Iterator[MappingNode]:
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if self._values > _MAX_VALUES:
                raise _TooMuch
            if isinstance(source, MappingNode):
                yield source
            else:
                self._document.lines[(*loc, "<<")] = (source.start_mark.line + 1,) * 2
                self._refuse((*loc, "<<"), "'<<' merges mappings only.", "Write an alias of one.")

    def _refuse(self, loc: Loc, message: str, remedy: str) -> None:
        self._document.problems.append(Problem(loc, message, remedy))


_MAX_TOLD = 50
"""Maximum number of reported mistakes per file.

The number of reported mistakes is limited because the first mistake may be the cause of all other mistakes.
"""


def text_of(path: Path, what: str, none: str) -> str:
    """Return the text of a file of the kind `what`.

    Raise JobFileError if the file cannot be read. `none` is the remedy in the error for a missing file.
    """
    try:
        # Refuse pipes and devices, because a read of a pipe or a device may wait forever.
        if path.exists() and not path.is_file():
            raise _unreadable(path, what, "it is not a file", _inside(path))
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError as error:
        raise JobFileError(f"There is no such {what}.", file=str(path), remedy=none) from error
    except UnicodeDecodeError as error:
        raise _unreadable(path, what, f"it is not UTF-8 text, from byte {error.start} on") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, getattr(error, "strerror", None) or str(error)) from error


def _inside(path: Path) -> str:
    """Return a hint if the path is a folder that contains one YAML file."""
    paths = sorted(path.glob("*.yaml")) if path.is_dir() else []
    return f"Did you mean {paths[0]}?" if len(paths) == 1 else ""


def _unreadable(path: Path, what: str, why: str, remedy: str = "") -> JobFileError:
    return JobFileError(
        f"The {what} cannot be read: {why}.", file=str(path), remedy=remedy or "Write the path of a text file in UTF-8."
    )


def wrong_kind(path: Path, message: str, remedy: str) -> JobFileErrors:
    """Return a single error for a file of the wrong kind, instead of an error for each key of the file."""
    return JobFileErrors([JobFileError(message, file=str(path), remedy=remedy)])


def errors(path: Path, document: Document, problems: Sequence[Problem]) -> JobFileErrors:
    """Return the error with all mistakes of a document, sorted by line and without duplicates."""
    by_line = {}
    for problem in problems:
        line = document.line(problem)
        # Report each mistake only once, because an alias repeats the mistakes of its anchor.
        by_line[line, problem.message] = JobFileError(problem.message, file=str(path), line=line, remedy=problem.remedy)
    job_file_errors = [by_line[key] for key in sorted(by_line, key=lambda key: key[0] or 0)]
    if len(job_file_errors) > _MAX_TOLD:
        more = f"There are {len(job_file_errors) - _MAX_TOLD} more mistakes."
        job_file_errors[_MAX_TOLD:] = [JobFileError(more, file=str(path), remedy="Correct the first ones first.")]
    return JobFileErrors(job_file_errors)
