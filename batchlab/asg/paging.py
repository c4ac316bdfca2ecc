"""Long answers in pages, as MaxRecords and NextToken ask for them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from batchlab.asg.fault import Fault, invalid

T = TypeVar("T")

MOST = 100
USUAL = 50


def page(
    items: Sequence[T], asked: Mapping[str, Any], key: Callable[[T], str], *, most: int = MOST
) -> tuple[Sequence[T], dict[str, Any]]:
    """The page that is asked for, and its NextToken where others follow.

    `key` tells items apart. A token holds the last item's key and number: a page goes on after
    that item, or where that is gone by now, at its number.
    """
    size = asked.get("MaxRecords", min(USUAL, most))
    if not 1 <= size <= most:
        raise invalid(f"MaxRecords must be between 1 and {most}.")
    start = 0
    if token := asked.get("NextToken"):
        last, number = _read(token)
        keys = [key(item) for item in items]
        start = keys.index(last) + 1 if last in keys else number
    found = items[start : start + size]
    if start + size >= len(items):
        return found, {}
    return found, {"NextToken": _token(key(found[-1]), start + size - 1)}


def _token(last: str, number: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([last, number]).encode()).decode()


def _read(token: str) -> tuple[str, int]:
    try:
        last, number = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
        if not isinstance(last, str) or not isinstance(number, int) or number < 0:
            raise TypeError(token)
    except (ValueError, TypeError) as error:
        raise Fault("InvalidNextToken", f"The token '{token}' is invalid.") from error
    return last, number
