"""Random sources that depend on a seed and a name, and on nothing else.

One source per file, so that file n has the same bytes however many files are asked for.
"""

from __future__ import annotations

import random


def source(seed: int, name: str) -> random.Random:
    """The random source for `name`; the same for ever, on every machine."""
    return random.Random(f"{seed}/{name}")  # noqa: S311  made-up data, not a secret
