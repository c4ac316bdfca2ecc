"""One SimpleDB domain as items of texts: what its limits and its moods make of every call.

Invariant: every read is consistent. A call that is refused for the time being, or whose answer is
lost, is made again here, and a conditional write then finds out whether it was itself that won.

Texts of any length in items that hold values of 1,024 bytes: cut over attributes, and where they
are more than fit beside others in one item, over items of their own.

Invariant: everything written is printable ASCII, since SimpleDB gives other characters back in a
form of its own.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from typing import Any, TypeVar

from batchlab.adapters.aws.endpoint import Endpoint, client, code_of, translated
from batchlab.core.errors import BackendError, Throttled, TooLarge, Unreachable, UsageError
from batchlab.core.model import Json
from batchlab.core.retry import doubled_s

T = TypeVar("T")

MAX_BYTES = 1024
"""Of a name or a value."""
MAX_PAIRS = 256
"""Attributes an item has at most."""
MAX_BATCH = 25
MAX_TESTS = 20
"""Comparisons in one Select."""
MAX_PAGE = 2500
MAX_REQUEST = 1_000_000
"""Bytes of one request, a little less than the service's 1 MiB."""

PATIENCE_S = 20.0
"""So long a call is made again that is throttled, before it is Throttled to the caller."""
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
_LOST_ANSWERS = 6
_AT_ONCE = 8
"""Requests of one call that are under way at the same time."""

_CONDITION = {"ConditionalCheckFailed", "AttributeDoesNotExist", "MultiValuedAttribute"}
_FULL = {"NumberDomainBytesExceeded", "NumberDomainAttributesExceeded"}

Pairs = Sequence[tuple[str, str]]
"""An item's attributes as they are written, (name, value)."""
Item = Mapping[str, str]
"""An item's attributes as they are read; several values of one are joined by commas."""


class _ConditionFailed(Exception):
    """The item is not as the call expected it."""


def quoted(text: str) -> str:
    """A value in a select expression."""
    return "'" + text.replace("'", "''") + "'"


class Store:
    """Blocks; for any number of threads. Raises Throttled, Unreachable and BackendError as the
    other AWS adapters do, and TooLarge for what no item can hold."""

    def __init__(self, endpoint: Endpoint, domain: str, *, connections: int) -> None:
        """For so many threads at once."""
        self.domain = domain
        self.table = "`" + domain.replace("`", "``") + "`"
        """The domain in a select expression."""
        self._sdb = client(endpoint, "sdb", connections=connections + _AT_ONCE)
        _check_region(self._sdb, endpoint.region)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="simpledb")
        self._random = random.Random()  # noqa: S311 (spreads retries)

    def close(self) -> None:
        """No other call may follow."""
        self._threads.shutdown()
        self._sdb.close()

    # --- Items ------------------------------------------------------------------------------------

    def get(self, name: str) -> Item | None:
        """None where there is no such item."""
        answer = self._ask("get_attributes", ItemName=name, ConsistentRead=True)
        return _item(answer.get("Attributes", ())) or None

    def get_all(self, names: Iterable[str]) -> list[Item | None]:
        """These items, asked for side by side."""
        return list(self._threads.map(self.get, names))

    def put_if(
        self, name: str, pairs: Pairs, key: str, value: str | None, *, more: Pairs = ()
    ) -> bool | None:
        """Write `pairs`, which give `key` a value that it never had before, if `key` has `value`
        now (None: if there is none). False where it has not; None where an answer was lost, and
        somebody has changed the item since.

        What `pairs` names is replaced; `more` is added to the values that are there.
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
                self._call(
                    "put_attributes", ItemName=name, Attributes=attributes, Expected=expected
                )
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
        """Write these, whatever is there; not at once, but a part again does no harm."""
        for name, pairs in items.items():
            check(name, pairs)
        list(self._threads.map(self._put_batch, _batches(items)))

    def _put_batch(self, batch: Sequence[tuple[str, Pairs]]) -> None:
        items = [{"Name": name, "Attributes": _replacing(pairs)} for name, pairs in batch]
        self._ask("batch_put_attributes", Items=items)

    def drop_value(self, name: str, key: str, value: str) -> None:
        """Remove that value, and no other, from an item's attribute."""
        self._ask("delete_attributes", ItemName=name, Attributes=[{"Name": key, "Value": value}])

    def delete_if(self, name: str, key: str, value: str) -> None:
        """Delete the item if `key` has `value`, and else leave it."""
        expected = {"Name": key, "Value": value, "Exists": True}

        def delete() -> None:
            try:
                self._call("delete_attributes", ItemName=name, Expected=expected)
            except _ConditionFailed:
                return

        self._patiently(delete)

    def delete_all(self, names: Iterable[str]) -> None:
        """Delete these; one that is not there is no error."""
        some = list(names)
        batches = [some[i : i + MAX_BATCH] for i in range(0, len(some), MAX_BATCH)]
        list(self._threads.map(self._delete_batch, batches))

    def _delete_batch(self, names: Sequence[str]) -> None:
        self._ask("batch_delete_attributes", Items=[{"Name": name} for name in names])

    # --- Select -----------------------------------------------------------------------------------

    def select(
        self, output: str, where: str, *, order: str = "", page: int = MAX_PAGE
    ) -> Iterator[tuple[str, Item]]:
        """(name, item) of all that is found; `page` of them are asked for at a time."""
        expression = f"select {output} from {self.table} where {where}"  # noqa: S608
        expression += f" order by {order}" if order else ""
        expression += f" limit {max(1, min(page, MAX_PAGE))}"
        more: dict[str, str] = {}
        while True:
            answer = self._ask(
                "select", SelectExpression=expression, ConsistentRead=True, domain=False, **more
            )
            for found in answer.get("Items", ()):
                yield found["Name"], _item(found.get("Attributes", ()))
            # A page may be short, even empty, and not the last one.
            if not answer.get("NextToken"):
                return
            more = {"NextToken": answer["NextToken"]}

    def select_named(self, output: str, names: Sequence[str]) -> dict[str, Item]:
        """Those of these items that are there, by name."""
        parts = [names[i : i + MAX_TESTS] for i in range(0, len(names), MAX_TESTS)]

        def some(part: Sequence[str]) -> list[tuple[str, Item]]:
            where = f"itemName() in ({', '.join(map(quoted, part))})"
            return list(self.select(output, where))

        return {name: item for found in self._threads.map(some, parts) for name, item in found}

    # --- Calls ------------------------------------------------------------------------------------

    def _ask(self, operation: str, **given: Any) -> Any:
        """A call that may be made twice."""
        return self._patiently(lambda: self._call(operation, **given))

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

    def _call(self, operation: str, *, domain: bool = True, **given: Any) -> Any:
        from botocore.exceptions import ClientError

        if domain:
            given["DomainName"] = self.domain
        with translated(f"SimpleDB domain {self.domain!r}"):
            try:
                return getattr(self._sdb, operation)(**given)
            except ClientError as error:
                code = code_of(error)
                if code in _CONDITION:
                    raise _ConditionFailed from error
                if code == "RequestTimeout":
                    raise Throttled(f"SimpleDB domain {self.domain!r} is slow.") from error
                if code == "NoSuchDomain":
                    # Not NotFound, which would say that there is no such job.
                    raise BackendError(
                        f"There is no SimpleDB domain {self.domain}.",
                        remedy="Deploy the stack with Ledger=simpledb, or name another domain.",
                    ) from error
                if code in _FULL:
                    raise BackendError(
                        f"The SimpleDB domain {self.domain} is full ({code}): it holds 10 GB and "
                        "10^9 attributes.",
                        remedy="Deploy the stack with Ledger=postgres; `batchlab ledger rebuild` "
                        "then makes the ledger anew from the bucket.",
                    ) from error
                raise


def _check_region(sdb: Any, region: str) -> None:
    """UsageError where AWS has no SimpleDB: its name would lead nowhere, as in an outage."""
    import boto3

    if sdb.meta.endpoint_url != f"https://sdb.{region}.amazonaws.com":
        return  # an emulator's, or us-east-1's, which has a name of its own
    regions = boto3.Session().get_available_regions("sdb")
    if region not in regions:
        raise UsageError(
            f"There is no SimpleDB in {region}.",
            remedy=f"Take another ledger, or one of {', '.join(regions)}.",
        )


def check(name: str, pairs: Pairs) -> None:
    """TooLarge for an item that SimpleDB cannot hold."""
    for text in (name, *(part for pair in pairs for part in pair)):
        if len(text.encode()) > MAX_BYTES:
            raise TooLarge(
                f"{text[:60]!r}… has {len(text.encode())} bytes: SimpleDB takes {MAX_BYTES} in a "
                "name or value.",
                remedy="Take shorter names, or another ledger.",
            )
    if len(pairs) > MAX_PAIRS:
        raise TooLarge(f"{name!r} has {len(pairs)} attributes: SimpleDB takes {MAX_PAIRS}.")


def _item(attributes: Iterable[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in attributes:
        name, value = one["Name"], one.get("Value", "")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def _replacing(pairs: Pairs) -> list[dict[str, Any]]:
    return [{"Name": name, "Value": value, "Replace": True} for name, value in pairs]


def _batches(items: Mapping[str, Pairs]) -> Iterator[list[tuple[str, Pairs]]]:
    batch: list[tuple[str, Pairs]] = []
    size = 0
    for name, pairs in items.items():
        # Three bytes for each where it is percent-encoded, and the names of the parameters.
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
