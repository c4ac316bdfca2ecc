"""The parts of a document that somebody else has written, each read as what it has to be.

Invariant: what comes back is of the type it is said to be, or it is a ValueError; nothing is turned
into that type.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any


def known(kind: Any, doc: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this batchlab knows; a later one may have added some."""
    return {name: doc[name] for name in kind.__slots__ if name in doc}


def text(value: Any) -> str:
    """The same; ValueError where it is no text."""
    if isinstance(value, str):
        return value
    raise ValueError(f"a text belongs there, and not {type(value).__name__}")


def figure(value: Any) -> float:
    """The same; ValueError where it is no finite number."""
    if isinstance(value, int | float) and isfinite(value):
        return value
    raise ValueError(f"a finite number belongs there, and not {type(value).__name__}")


def whole(value: Any) -> int:
    """The same; ValueError where it is no whole number."""
    if isinstance(value, int):
        return value
    raise ValueError(f"a whole number belongs there, and not {type(value).__name__}")
