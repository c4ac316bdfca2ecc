"""One SimpleDB domain as a store of items, within SimpleDB's limits and with retries.

Invariants: every read of the domain is consistent. This module retries a call that is throttled or whose answer is
lost. After the retry of a conditional write, the module checks whether the lost attempt succeeded. All written texts
are printable ASCII, because SimpleDB returns other characters in an encoded form.

A SimpleDB value has at most 1,024 bytes. A longer text is split over attributes of its item. A text that does not fit
into one item is split over further items.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any, TypeVar

from batchlab.adapters.aws.endpoint import Endpoint, client, code_of, translate_errors
from batchlab.core.errors import BackendError, Throttled, TooLarge, Unreachable, UsageError
from batchlab.core.model import Json
from batchlab.core.port_retries import doubled_s

T = TypeVar("T")

MAX_BYTES = 1024
"""Maximum size of a name or a value in bytes."""
MAX_PAIRS = 256
"""Maximum number of attributes of an item."""
MAX_BATCH = 25
MAX_TESTS = 20
"""Maximum number of comparisons in one Select."""
MAX_PAGE = 2500
MAX_REQUEST = 1_000_000
"""Maximum size of a request in bytes, a little below SimpleDB's limit of 1 MiB."""

PATIENCE_S = 20.0
"""Time in seconds for which a throttled call is retried before the caller gets Throttled."""
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
_LOST_ANSWERS = 6
_AT_ONCE = 8
"""Maximum number of concurrent requests of one call of `Store`."""

_CONDITION = {"ConditionalCheckFailed", "AttributeDoesNotExist", "MultiValuedAttribute"}
_FULL = {"NumberDomainBytesExceeded", "NumberDomainAttributesExceeded"}

Pairs = Sequence[tuple[str, str]]
"""Attributes of an item to write, as pairs (name, value)."""
Item = Mapping[str, str]
"""Attributes of an item that was read. Several values of one attribute are joined by commas."""


class _ConditionFailed(Exception):
    """Error for a condition that failed: the item in SimpleDB does not have the expected value."""


def quote(text: str) -> str:
    """Return a value as a literal of a select expression."""
    return "'" + text.replace("'", "''") + "'"


class Store:
    """A SimpleDB domain as a store of items. Calls block their thread, and several threads may share the store.

    The store raises Throttled, Unreachable, and BackendError like the other AWS adapters, and TooLarge for content that
    is too large for an item.
    """

    def __init__(self, endpoint: Endpoint, domain: str, *, connections: int) -> None:
        """Open the domain for `connections` threads at once."""
        self.domain = domain
        self.table = "`" + domain.replace("`", "``") + "`"
        """Name of the domain, quoted for a select expression."""
        self._sdb = client(endpoint, "sdb", connections=connections + _AT_ONCE)
        _check_region(self._sdb, endpoint.region)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="simpledb")
        self._random = random.Random()  # noqa: S311 (spreads retries)

    def close(self) -> None:
        """End the threads and close the connections. The store does not accept calls after `close`."""
        self._threads.shutdown()
        self._sdb.close()

    # --- Items ------------------------------------------------------------------------------------

    def get(self, name: str) -> Item | None:
        """Return the item of that name, or None if the item does not exist."""
        answer = self._ask("get_attributes", ItemName=name, ConsistentRead=True)
        return _item(answer.get("Attributes", ())) or None

    def get_all(self, names: Iterable[str]) -> list[Item | None]:
        """Return the items of the given names, requested concurrently."""
        return list(self._threads.map(self.get, names))

    def put_if(self, name: str, pairs: Pairs, key: str, value: str | None, *, more: Pairs = ()) -> bool | None:
        """Write `pairs` to the item if its attribute `key` has `value`. If `value` is None, `key` must not exist in the
        item.

        `pairs` must give `key` a value that `key` never had before. Return False if the condition on `key` failed.
        Return None if an answer was lost and another process has changed the item since.

        The attributes of `pairs` replace the existing attributes. The values of `more` are added to existing values.
        """
        expected: dict[str, Any] = {"Name": key, "Exists": False}
        if value is not None:
            expected = {"Name": key, "Value": value, "Exists": True}
        attributes = [*_replacing(pairs), *({"Name": k, "Value": v} for k, v in more)]
        check(name, [*pairs, *more])
        doubtful = False

        def put() -> bool | None:
            nonlocal doubtful
            try:
                self._call("put_attributes", ItemName=name, Attributes=attributes, Expected=expected)
            except _ConditionFailed:
                if not doubtful:
                    return False
                ours = (self.get(name) or {}).get(key) == dict(pairs)[key]
                return True if ours else None
            except Unreachable:
                doubtful = True
                raise
            return True

        return self._patiently(put)

    def put_all(self, items: Mapping[str, Pairs]) -> None:
        """Write the given items without a condition.

        The writes of several items are not atomic, but may be repeated.
        """
        for name, pairs in items.items():
            check(name, pairs)

        def put(batch: Sequence[tuple[str, Pairs]]) -> None:
            entries = [{"Name": name, "Attributes": _replacing(pairs)} for name, pairs in batch]
            self._ask("batch_put_attributes", Items=entries)

        list(self._threads.map(put, _batches(items)))

    def drop_value(self, name: str, key: str, value: str) -> None:
        """Remove one value of an item's attribute."""
        self._ask("delete_attributes", ItemName=name, Attributes=[{"Name": key, "Value": value}])

    def delete_if(self, name: str, key: str, value: str) -> None:
        """Delete the item if `key` has `value`."""
        expected = {"Name": key, "Value": value, "Exists": True}

        def delete() -> None:
            try:
                self._call("delete_attributes", ItemName=name, Expected=expected)
            except _ConditionFailed:
                return

        self._patiently(delete)

    def delete_all(self, names: Iterable[str]) -> None:
        """Delete the items of the given names. Ignore items that do not exist."""
        all_names = list(names)
        batches = [all_names[i : i + MAX_BATCH] for i in range(0, len(all_names), MAX_BATCH)]
        list(self._threads.map(self._delete_batch, batches))

    def _delete_batch(self, names: Sequence[str]) -> None:
        self._ask("batch_delete_attributes", Items=[{"Name": name} for name in names])

    # --- Select -----------------------------------------------------------------------------------

    def select(self, output: str, where: str, *, order: str = "", page: int = MAX_PAGE) -> Iterator[tuple[str, Item]]:
        """Yield (name, item) for all results of the select expression. Each request asks for up to `page` results."""
        expression = f"select {output} from {self.table} where {where}"  # noqa: S608
        expression += f" order by {order}" if order else ""
        expression += f" limit {max(1, min(page, MAX_PAGE))}"
        more: dict[str, str] = {}
        while True:
            answer = self._ask("select", SelectExpression=expression, ConsistentRead=True, domain=False, **more)
            for row in answer.get("Items", ()):
                yield row["Name"], _item(row.get("Attributes", ()))
            # A page of results may be short or even empty without being the last page.
            if not answer.get("NextToken"):
                return
            more = {"NextToken": answer["NextToken"]}

    def select_named(self, output: str, names: Sequence[str]) -> dict[str, Item]:
        """Return the existing items of the given names, by name."""
        parts = [names[i : i + MAX_TESTS] for i in range(0, len(names), MAX_TESTS)]

        def select_part(part: Sequence[str]) -> list[tuple[str, Item]]:
            where = f"itemName() in ({', '.join(map(quote, part))})"
            return list(self.select(output, where))

        return {name: item for items in self._threads.map(select_part, parts) for name, item in items}

    # --- Calls ------------------------------------------------------------------------------------

    def _ask(self, operation: str, **parameters: Any) -> Any:
        """Make a SimpleDB call with retries. The call must be safe to repeat."""
        return self._patiently(lambda: self._call(operation, **parameters))

    def _patiently(self, call: Callable[[], T]) -> T:
        deadline_s = time.monotonic() + PATIENCE_S
        wait_s, lost = _FIRST_WAIT_S, 0
        while True:
            try:
                return call()
            except Throttled:
                if time.monotonic() > deadline_s:
                    raise
            except Unreachable:
                lost += 1
                if lost >= _LOST_ANSWERS or time.monotonic() > deadline_s:
                    raise
            time.sleep(wait_s * (0.5 + self._random.random()))
            wait_s = doubled_s(wait_s, _LONGEST_WAIT_S)

    def _call(self, operation: str, *, domain: bool = True, **parameters: Any) -> Any:
        from botocore.exceptions import ClientError

        if domain:
            parameters["DomainName"] = self.domain
        with translate_errors(f"SimpleDB domain {self.domain!r}"):
            try:
                return getattr(self._sdb, operation)(**parameters)
            except ClientError as error:
                code = code_of(error)
                if code in _CONDITION:
                    raise _ConditionFailed from error
                if code == "RequestTimeout":
                    raise Throttled(f"SimpleDB domain {self.domain!r} is slow.") from error
                if code == "NoSuchDomain":
                    # The error is not NotFound, because the caller would conclude from NotFound that the job does not
                    # exist.
                    raise BackendError(
                        f"The SimpleDB domain {self.domain} does not exist.",
                        remedy="Deploy the stack with Ledger=simpledb, or name another domain.",
                    ) from error
                if code in _FULL:
                    raise BackendError(
                        f"The SimpleDB domain {self.domain} is full ({code}): it holds 10 GB and 10^9 attributes.",
                        remedy="Deploy the stack with Ledger=postgres. Then `batchlab grid rebuild-ledger` creates the "
                        "ledger again from the bucket.",
                    ) from error
                raise


def _check_region(sdb: Any, region: str) -> None:
    """Raise UsageError for a region without SimpleDB.

    Without this check, a request to a region without SimpleDB would fail in the same way as during an outage of
    SimpleDB.
    """
    import boto3

    if sdb.meta.endpoint_url != f"https://sdb.{region}.amazonaws.com":
        return  # The url belongs to an emulator or to us-east-1. SimpleDB's host name in us-east-1 has another form.
    regions = boto3.Session().get_available_regions("sdb")
    if region not in regions:
        raise UsageError(
            f"SimpleDB is not available in {region}.",
            remedy=f"Use another ledger, or one of the regions {', '.join(regions)}.",
        )


def check(name: str, pairs: Pairs) -> None:
    """Raise TooLarge if the item exceeds SimpleDB's limits."""
    for text in (name, *(part for pair in pairs for part in pair)):
        if len(text.encode()) > MAX_BYTES:
            raise TooLarge(
                f"{text[:60]!r}… has {len(text.encode())} bytes, and SimpleDB allows {MAX_BYTES} in a name or value.",
                remedy="Use shorter names, or another ledger.",
            )
    if len(pairs) > MAX_PAIRS:
        raise TooLarge(f"{name!r} has {len(pairs)} attributes, and SimpleDB allows {MAX_PAIRS}.")


def _item(attributes: Iterable[Mapping[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for attribute in attributes:
        name, value = attribute["Name"], attribute.get("Value", "")
        values[name] = f"{values[name]},{value}" if name in values else value
    return values


def _replacing(pairs: Pairs) -> list[dict[str, Any]]:
    return [{"Name": name, "Value": value, "Replace": True} for name, value in pairs]


def _batches(items: Mapping[str, Pairs]) -> Iterator[list[tuple[str, Pairs]]]:
    batch: list[tuple[str, Pairs]] = []
    size = 0
    for name, pairs in items.items():
        # The estimate of the request's size counts three bytes for each byte, because of percent encoding. The estimate
        # also includes the parameter names.
        cost = 3 * len(name.encode()) + 60
        cost += sum(3 * (len(k.encode()) + len(v.encode())) + 120 for k, v in pairs)
        if batch and (len(batch) == MAX_BATCH or size + cost > MAX_REQUEST):
            yield batch
            batch, size = [], 0
        batch.append((name, pairs))
        size += cost
    if batch:
        yield batch


INLINE = 100
"""Maximum number of parts of a text that are stored in its own item."""
_PER_ITEM = 250

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def dumps(value: Json) -> str:
    """Return compact JSON in ASCII."""
    return _encode(value)


def split(
    name: str, prefix: str, text: str, gen: str, *, inline: int = INLINE
) -> tuple[list[tuple[str, str]], dict[str, Pairs]]:
    """Return the attributes that store `text`, and the further items that a long text needs.

    The attributes contain the text or refer to the further items. The further items belong to the generation `gen`,
    have names that begin with `name`, and must be written first.
    """
    parts = [text[i : i + MAX_BYTES] for i in range(0, len(text), MAX_BYTES)]
    if len(parts) <= inline:
        pieces = [(f"{prefix}{i:03d}", part) for i, part in enumerate(parts)]
        return [(prefix, f"{len(parts)}"), *pieces], {}
    items: dict[str, Pairs] = {}
    for number, start in enumerate(range(0, len(parts), _PER_ITEM)):
        chunk = parts[start : start + _PER_ITEM]
        pieces = [(f"{i:03d}", part) for i, part in enumerate(chunk)]
        items[f"{name}/{prefix}{number:06d}"] = [("gen", gen), *pieces]
    return [(prefix, f"{len(parts)}@{name}")], items


def names(item: Item, prefix: str) -> list[str]:
    """Return the names of the further items of a long text."""
    count, _, name = item.get(prefix, "").partition("@")
    return [f"{name}/{prefix}{n:06d}" for n in range(ceil(int(count) / _PER_ITEM))] if name else []


def join(item: Item, prefix: str, get_all: Callable[[Iterable[str]], list[Item | None]]) -> str | None:
    """Return the text of an item, or None if one of the text's further items no longer exists."""
    count, _, elsewhere = item[prefix].partition("@")
    if not elsewhere:
        return "".join(item[f"{prefix}{i:03d}"] for i in range(int(count)))
    parts: list[str] = []
    for item_part in get_all(names(item, prefix)):
        if item_part is None:
            return None
        count_left = min(_PER_ITEM, int(count) - len(parts))
        parts += [item_part[f"{i:03d}"] for i in range(count_left)]
    return "".join(parts)
