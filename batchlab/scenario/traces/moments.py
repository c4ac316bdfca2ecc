"""Timestamps as traces write them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from enum import Enum
from math import isfinite
from typing import NamedTuple

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ONE = r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][-+]?\d++)?"
_NUMBER = re.compile(rf"\s*{_ONE}\s*")
_NUMBERS = re.compile(rf"\s*(?:{_ONE}(?:\s++|\Z))*")
_DIRECTIVE = re.compile("%(.)")
_LEAP_YEAR = 1972


class Kind(Enum):
    """How a moment was written."""

    NUMBER = "a number"
    ZONED = "a timestamp with a zone"
    LOCAL = "a timestamp without a zone"


class Moment(NamedTuple):
    """Seconds on one time line: since 1970, where it was no number."""

    at_s: float
    kind: Kind


def check_unit(unit: str) -> None:
    """ValueError where `unit` is neither one of UNITS nor a format that strptime could read."""
    if unit in UNITS:
        return
    if "%" not in unit:
        raise ValueError(f"the unit must be one of {', '.join(UNITS)} or a time format")
    try:
        # What it writes it must be able to read.
        _parsed(_EPOCH.strftime(unit), unit)
    except (ValueError, re.error) as error:
        why = error if isinstance(error, ValueError) else "a directive is there twice"
        raise ValueError(f"{unit!r} is no format that strptime can read: {why}") from error


def as_number(value: object) -> float | None:
    """A finite number, from a number or its text; None for anything else."""
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None


def all_numbers(text: str) -> bool:
    """Whether `text` is nothing but numbers with blanks between them, a quick look for most."""
    return _NUMBERS.fullmatch(text) is not None


def as_moment(value: object, unit: str) -> Moment | None:
    """A timestamp without a zone is read as UTC, which may be off by its zone. None where `value`
    is no time.

    A number counts in `unit`, a text is ISO 8601 (a space may stand for the T, and a fraction have
    any digits), or what the strptime format `unit` says.
    """
    if unit in UNITS:
        number = as_number(value)
        if number is not None:
            return Moment(number * UNITS[unit], Kind.NUMBER)
    if not isinstance(value, str):
        return None
    try:
        text = value.strip()
        read = datetime.fromisoformat(text) if unit in UNITS else _parsed(text, unit)
    except ValueError:
        return None
    if read.tzinfo is None:
        return Moment((read.replace(tzinfo=UTC) - _EPOCH).total_seconds(), Kind.LOCAL)
    return Moment((read - _EPOCH).total_seconds(), Kind.ZONED)


def _parsed(text: str, form: str) -> datetime:
    directives = set(_DIRECTIVE.findall(form))
    if "d" in directives and not directives & {"Y", "y", "G"}:
        # strptime would take 1900, which has no 29 February, and from Python 3.15 on refuse.
        text, form = f"{_LEAP_YEAR} {text}", f"%Y {form}"
    return datetime.strptime(text, form)  # noqa: DTZ007 - the caller asks for the zone
