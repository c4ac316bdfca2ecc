"""Texts of any length in items that hold values of 1,024 bytes: cut over attributes, and where they
are more than fit beside others in one item, over items of their own.

Invariant: everything written is printable ASCII, since SimpleDB gives other characters back in a
form of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import ceil

from batchlab.adapters.simpledb.store import MAX_BYTES, Item, Pairs
from batchlab.model import Json

INLINE = 100
"""So many pieces of a text stay in the item that it belongs to."""
_PER_ITEM = 250

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def dumps(value: Json) -> str:
    """Compact JSON in ASCII."""
    return _encode(value)


def lay(
    name: str, prefix: str, text: str, gen: str, *, inline: int = INLINE
) -> tuple[list[tuple[str, str]], dict[str, Pairs]]:
    """The attributes that hold `text`, or that say where it is, and the further items it takes.
    Those are called `name`/..., of the generation `gen`, and must be written before."""
    parts = [text[i : i + MAX_BYTES] for i in range(0, len(text), MAX_BYTES)]
    if len(parts) <= inline:
        pieces = [(f"{prefix}{i:03d}", part) for i, part in enumerate(parts)]
        return [(prefix, f"{len(parts)}"), *pieces], {}
    items: dict[str, Pairs] = {}
    for number, start in enumerate(range(0, len(parts), _PER_ITEM)):
        some = parts[start : start + _PER_ITEM]
        pieces = [(f"{i:03d}", part) for i, part in enumerate(some)]
        items[f"{name}/{prefix}{number:06d}"] = [("gen", gen), *pieces]
    return [(prefix, f"{len(parts)}@{name}")], items


def names(item: Item, prefix: str) -> list[str]:
    """The further items that the text takes."""
    count, _, name = item.get(prefix, "").partition("@")
    return [f"{name}/{prefix}{n:06d}" for n in range(ceil(int(count) / _PER_ITEM))] if name else []


def read(
    item: Item, prefix: str, get_all: Callable[[Iterable[str]], list[Item | None]]
) -> str | None:
    """The text; None where a further item is not there any more."""
    count, _, elsewhere = item[prefix].partition("@")
    if not elsewhere:
        return "".join(item[f"{prefix}{i:03d}"] for i in range(int(count)))
    parts: list[str] = []
    for found in get_all(names(item, prefix)):
        if found is None:
            return None
        left = min(_PER_ITEM, int(count) - len(parts))
        parts += [found[f"{i:03d}"] for i in range(left)]
    return "".join(parts)
