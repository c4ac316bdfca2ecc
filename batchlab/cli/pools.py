"""A pool as text: NAME:MIN-MAXxSLOTS, as in default:0-4x1; on AWS with @TYPE,TYPE behind it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from batchlab.errors import UsageError
from batchlab.model import Pool

_FORM = re.compile(r"([a-z0-9][a-z0-9_-]{0,39}):(\d{1,5})-(\d{1,5})x(\d{1,4})")


def parse(text: str) -> Pool:
    """The pool that `text` describes; UsageError."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise UsageError(
            f"The pool {text!r} is not NAME:MIN-MAXxSLOTS.",
            remedy="Write for example default:0-4x1: no to four instances with one slot each. A "
            "name has up to 40 small letters, digits, '-' and '_'.",
        )
    smallest, largest, slots = (int(number) for number in found.groups()[1:])
    pool = Pool(found[1], smallest, largest, slots)
    if pool.min_size > pool.max_size or pool.slots < 1:
        raise UsageError(
            f"The pool {text!r} needs MIN ≤ MAX and at least one slot.",
            remedy="Write for example default:0-4x1.",
        )
    return pool


def parse_typed(text: str) -> tuple[Pool, tuple[str, ...]]:
    """The pool that `text` describes, and the instance types it names; UsageError."""
    form, at, types = text.partition("@")
    names = tuple(one.strip() for one in types.split(","))
    if at and not all(names):
        raise UsageError(
            f"The pool {text!r} lacks an instance type after '@'.",
            remedy="Write for example default:0-4x1@m7i.large,m6i.large.",
        )
    return parse(form), names if at else ()


def parse_all(texts: Iterable[str]) -> list[Pool]:
    """The pools; UsageError, also where two share a name."""
    pools = [parse(text) for text in texts]
    names = [pool.name for pool in pools]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"The pool {name!r} is given twice.", remedy="Give each pool one --pool."
            )
    return pools
