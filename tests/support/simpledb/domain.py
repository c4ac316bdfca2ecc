"""One domain with its current items, the items that an eventually consistent read may return, and the limits of the
service."""

from __future__ import annotations

import base64
import heapq
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from tests.support.simpledb import expressions
from tests.support.simpledb.expressions import NAME, Comparison, Item, Joined, Query

MAX_BYTES = 1024
MAX_PAIRS = 256
MAX_BATCH = 25
MAX_ANSWER = 1024 * 1024


class Fault(Exception):
    """An error answer, with SimpleDB's error code and the HTTP status."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Put:
    """One attribute of a PutAttributes call."""

    name: str
    value: str
    replace: bool


@dataclass(frozen=True)
class Expected:
    """The condition of a put or a delete."""

    name: str
    value: str | None
    exists: bool | None


def check_text(what: str, text: str, *, empty: bool = True) -> None:
    """Raise Fault if a name or a value is too long."""
    if len(text.encode()) > MAX_BYTES:
        raise Fault(
            400,
            "InvalidParameterValue",
            f"Value ({text[:40]}...) for parameter {what} is invalid. Value exceeds maximum length of 1024.",
        )
    if not text and not empty:
        raise Fault(400, "MissingParameter", f"The request must contain the parameter {what}.")


class Domain:
    """A SimpleDB domain. Only one thread may use the domain at a time."""

    def __init__(self, rng: Random) -> None:
        self.items: dict[str, Item] = {}
        self.lag_s = 0.0
        """The maximum delay of an eventually consistent read."""
        self.max_attributes = 1_000_000_000
        self.max_bytes = 10 * 1024**3
        self._attributes = 0
        self._bytes = 0
        self._rng = rng
        self._index: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._replica: dict[str, Item] = {}
        self._on_the_way: list[tuple[float, int, str, Item | None]] = []
        self._due_s: dict[str, float] = {}
        self._numbers = itertools.count()

    # --- Writing ----------------------------------------------------------------------------------

    def check(self, item: str, expected: Expected | None) -> None:
        """Raise Fault if the condition does not hold."""
        if expected is None:
            return
        if expected.exists is False and expected.value is not None:
            raise Fault(
                400, "ExistsAndExpectedValue", "Expected.Exists=false and Expected.Value cannot be specified together"
            )
        if expected.exists is not False and expected.value is None:
            raise Fault(
                400,
                "IncompleteExpectedExpression",
                "If Expected.Exists=true or unspecified, then Expected.Value has to be specified",
            )
        values = self.items.get(item, {}).get(expected.name, frozenset())
        if expected.exists is False:
            if values:
                raise Fault(
                    409, "ConditionalCheckFailed", f"Conditional check failed. Attribute ({expected.name}) value exists"
                )
            return
        if not values:
            raise Fault(404, "AttributeDoesNotExist", f"Attribute ({expected.name}) does not exist")
        if len(values) > 1:
            raise Fault(
                409,
                "MultiValuedAttribute",
                f"Attribute ({expected.name}) is multi-valued. Conditional check can only be "
                "performed on a single-valued attribute",
            )
        (value,) = values
        if value != expected.value:
            raise Fault(
                409,
                "ConditionalCheckFailed",
                f"Conditional check failed. Attribute ({expected.name}) value is ({value}) but "
                f"was expected ({expected.value})",
            )

    def put(self, items: Sequence[tuple[str, Sequence[Put]]]) -> None:
        """Put all attributes, or none if one of them is refused."""
        after = {name: self._after(name, puts) for name, puts in items}
        pairs = sum(_pairs(new) - _pairs(self.items.get(name, {})) for name, new in after.items())
        if self._attributes + pairs > self.max_attributes:
            raise Fault(409, "NumberDomainAttributesExceeded", "Too many attributes in this domain")
        size = sum(_size(name, new) - _size(name, self.items.get(name)) for name, new in after.items())
        if self._bytes + size > self.max_bytes:
            raise Fault(409, "NumberDomainBytesExceeded", "Too many bytes in this domain")
        for name, new in after.items():
            self._set(name, new)

    def _after(self, name: str, puts: Sequence[Put]) -> Item:
        check_text("ItemName", name, empty=False)
        if not puts:
            raise Fault(400, "MissingParameter", "No attributes for an item")
        if len(puts) > MAX_PAIRS:
            raise Fault(409, "NumberSubmittedAttributesExceeded", "Too many attributes in a single call")
        new: dict[str, frozenset[str]] = dict(self.items.get(name, {}))
        for replaced in {put.name for put in puts if put.replace}:
            new.pop(replaced, None)
        for put in puts:
            check_text("Name", put.name, empty=False)
            check_text("Value", put.value)
            new[put.name] = new.get(put.name, frozenset()) | {put.value}
        if _pairs(new) > MAX_PAIRS:
            raise Fault(409, "NumberItemAttributesExceeded", "Too many attributes in this item")
        return new

    def delete(self, name: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        """Delete attributes. Without attributes, delete the whole item. Without a value, delete all values of an
        attribute."""
        check_text("ItemName", name, empty=False)
        new: dict[str, frozenset[str]] = dict(self.items.get(name, {})) if attributes else {}
        for attribute, value in attributes:
            left = new.get(attribute, frozenset()) - {value} if value is not None else frozenset()
            new.pop(attribute, None)
            if left:
                new[attribute] = left
        self._set(name, new)

    def _set(self, name: str, new: Item) -> None:
        old = self.items.pop(name, {})
        self._attributes += _pairs(new) - _pairs(old)
        self._bytes += _size(name, new) - _size(name, old)
        for attribute, values in old.items():
            for value in values - new.get(attribute, frozenset()):
                self._index[attribute][value].discard(name)
                if not self._index[attribute][value]:
                    del self._index[attribute][value]
        for attribute, values in new.items():
            for value in values:
                self._index[attribute][value].add(name)
        if new:
            self.items[name] = new
        now_s = time.monotonic()
        due_s = max(now_s + self._rng.random() * self.lag_s, self._due_s.get(name, 0.0))
        self._due_s[name] = due_s
        heapq.heappush(self._on_the_way, (due_s, next(self._numbers), name, new or None))

    # --- Reading ----------------------------------------------------------------------------------

    def seen(self, *, consistent: bool) -> Mapping[str, Item]:
        """Return the items that a consistent or an eventually consistent read returns."""
        now_s = time.monotonic()
        while self._on_the_way and self._on_the_way[0][0] <= now_s:
            _, _, name, item = heapq.heappop(self._on_the_way)
            if item is None:
                self._replica.pop(name, None)
            else:
                self._replica[name] = item
        return self.items if consistent else self._replica

    def select(
        self, query: Query, token: str | None, *, consistent: bool, at_most: int | None
    ) -> tuple[list[tuple[str, Item]], int, str | None]:
        """Return the items of one page, the number of counted items, and the token of the next page. The service cuts a
        page short after five seconds. `at_most` simulates this limit, and may be 0."""
        last = _last(query, token)
        seen = self.seen(consistent=consistent)
        some = self._candidates(query.where) if consistent else None
        names = seen if some is None else (name for name in some if name in seen)
        found = [
            (_sort_key(query, name, seen[name]), name)
            for name in names
            if expressions.matches(query.where, name, seen[name])
            and (query.order in (None, NAME) or query.order in seen[name])
        ]
        found.sort(reverse=query.descending)
        if last is not None:
            found = [one for one in found if (one < last if query.descending else one > last)]
        limit = query.limit or (len(found) if query.counts else expressions.DEFAULT_LIMIT)
        page: list[tuple[str, Item]] = []
        size = 0
        for _, name in found[:limit]:
            if at_most is not None and len(page) >= at_most:
                break
            item = _shown(query, seen[name])
            size += _answer_size(name, item)
            if size > MAX_ANSWER and not query.counts:
                break
            page.append((name, item))
        if len(page) == len(found):
            return page, len(page), None
        after = found[len(page) - 1] if page else last
        return page, len(page), _token(query, after)

    def _candidates(self, node: expressions.Node | None) -> set[str] | None:
        """Return a set that includes all matching items, found by the index. The result None means that every item may
        match."""
        if isinstance(node, Joined):
            sides = [self._candidates(node.left), self._candidates(node.right)]
            known = [side for side in sides if side is not None]
            if node.operator in ("and", "intersection"):
                return min(known, key=len) if known else None
            return set().union(*known) if node.operator == "or" and len(known) == 2 else None
        if not isinstance(node, Comparison) or node.every or node.operator == "is null":
            return None
        if node.attribute == NAME:
            return set(node.values) if node.operator in ("=", "in") else None
        index = self._index.get(node.attribute, {})
        if node.operator in ("=", "in"):
            return set().union(*(index.get(value, set()) for value in node.values))
        return set().union(*(names for value, names in index.items() if node.holds(value)))

    def facts(self) -> dict[str, int]:
        """Return the counts of DomainMetadata."""
        names = {name for item in self.items.values() for name in item}
        return {
            "ItemCount": len(self.items),
            "ItemNamesSizeBytes": sum(len(name.encode()) for name in self.items),
            "AttributeNameCount": len(names),
            "AttributeNamesSizeBytes": sum(len(name.encode()) for name in names),
            "AttributeValueCount": self._attributes,
            "AttributeValuesSizeBytes": sum(
                len(v.encode()) for item in self.items.values() for values in item.values() for v in values
            ),
        }


def _pairs(item: Item) -> int:
    return sum(len(values) for values in item.values())


def _size(name: str, item: Item | None) -> int:
    if not item:
        return 0
    return len(name.encode()) + sum(
        len(attribute.encode()) + len(value.encode()) for attribute, values in item.items() for value in values
    )


def _answer_size(name: str, item: Item) -> int:
    # An estimate of the size of the XML tags around the values.
    return _size(name, item) + 40 + 60 * _pairs(item)


def _shown(query: Query, item: Item) -> Item:
    if query.output is None:
        return item
    return {name: item[name] for name in query.output if name in item}


def _sort_key(query: Query, name: str, item: Item) -> bytes:
    if query.order is None:
        return b""
    if query.order == NAME:
        return name.encode()
    values: Iterable[bytes] = (value.encode() for value in item.get(query.order, {""}))
    return max(values) if query.descending else min(values)


def _token(query: Query, last: tuple[bytes, str] | None) -> str:
    doc = [query.fingerprint, last and [last[0].decode(), last[1]]]
    return base64.b64encode(json.dumps(doc).encode()).decode()


def _last(query: Query, token: str | None) -> tuple[bytes, str] | None:
    if token is None:
        return None
    try:
        fingerprint, last = json.loads(base64.b64decode(token))
    except ValueError:
        fingerprint, last = None, None
    if fingerprint != query.fingerprint:
        raise Fault(400, "InvalidNextToken", "The specified next token is not valid.")
    return (last[0].encode(), last[1]) if last else None
