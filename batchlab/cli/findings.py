"""The lines of `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; `remedy` says what to do about it."""

    about: str
    level: Level
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.about,
            "level": self.level.value,
            "text": self.text,
            "remedy": self.remedy,
        }
