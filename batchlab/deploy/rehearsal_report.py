"""Report of a rehearsal, as a JSON document and as a Markdown page that a user can send to a colleague.

Invariant: a report does not contain secrets. It shows only the last four digits of the account's number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchlab.core.text import span, visible

_SHOWN_DIGITS = 4
_HIDDEN = "[hidden]"
_SIGNATURE = re.compile(r"(?i)(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+")
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")


def masked(account: str) -> str:
    """Return an account's number with asterisks for all digits except the last four."""
    return f"{'*' * (len(account) - _SHOWN_DIGITS)}{account[-_SHOWN_DIGITS:]}"


@dataclass(frozen=True, slots=True)
class Redaction:
    """Removal of the account's number, of secrets, and of the user's home folder from all texts of a report."""

    account: str
    secrets: tuple[str, ...] = ()

    def apply(self, value: Any) -> Any:
        """Return a copy of a JSON value with redacted texts."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, Mapping):
            return {key: self.apply(part) for key, part in value.items()}
        if isinstance(value, Iterable):
            return [self.apply(part) for part in value]
        return value

    def _text(self, text: str) -> str:
        for secret in filter(None, self.secrets):
            text = text.replace(secret, _HIDDEN)
        text = _ACCESS_KEY.sub(_HIDDEN, _SIGNATURE.sub(rf"\1{_HIDDEN}", text))
        if self.account:
            text = text.replace(self.account, masked(self.account))
        home = str(Path.home())
        # In some containers, the home folder is "/", which is a part of every path.
        return text.replace(home, "~") if len(home) > 1 else text


def markdown(document: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page. `document` is the report's JSON document."""
    steps = document["steps"]
    lines = ["# Rehearsal of batchlab on AWS", "", f"**{document['verdict']}**", ""]
    lines += _table(("", ""), [(name, value) for name, value in document["about"].items()])
    rows = [(step["name"], step["what"], step["outcome"], span(step["seconds"])) for step in steps]
    lines += ["", *_table(("step", "work", "result", "time"), rows)]
    for step in steps:
        lines += ["", *_section(step)]
    lines += ["", "## Expected cost", "", document["expected"]["text"], ""]
    lines += _table(
        ("item", "expected cost", "how"), [(i["what"], i["text"], i["how"]) for i in document["expected"]["items"]]
    )
    lines += ["", "## Left behind", "", *_left(document["left"])]
    return visible("\n".join(lines) + "\n")


def _section(step: Mapping[str, Any]) -> list[str]:
    notes = step["notes"]
    lines = [f"## {step['name'].capitalize()}: {step['outcome']}"]
    lines += ["", _inline(step["reason"])] if step["reason"] else []
    lines += ["", *(f"- {_inline(sentence)}" for sentence in notes["done"])] if notes["done"] else []
    if notes["comparisons"]:
        rows = [(row["subject"], row["expected"], row["observed"]) for row in notes["comparisons"]]
        lines += ["", *_table(("", "expected", "observed"), rows)]
    return lines


def _left(left: Sequence[Mapping[str, str]]) -> list[str]:
    if not left:
        return ["Nothing was found."]
    return _table(("resource", "command that removes it"), [(one["resource"], f"`{one['command']}`") for one in left])


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = [[_inline(str(cell)).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(columns), ["---"] * len(columns), *cells]]


def _inline(text: str) -> str:
    return " ".join(text.split())
