"""Items of bundles, and the queries on them.

Invariant: an item only gains attributes: from the write that planned the bundle, and from the write
that folded it. Each write adds its number. So a reader sees the bundles as of the moment at which
it read the item of the job, even if other writes happen meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from batchlab.adapters.simpledb import domain
from batchlab.adapters.simpledb.domain import Item, Pairs, Store, check, quoted
from batchlab.core.errors import BackendError
from batchlab.core.ledger_projection import BundleRow, Key, Known, Projection
from batchlab.core.model import BundleId, StageName
from batchlab.core.protocol import json_format


def row_items(gen: str, row: BundleRow) -> dict[str, Pairs]:
    """Return the items to write for a bundle. Further items for long texts come first."""
    name = _name(gen, row.key)
    pairs: list[tuple[str, str]] = []
    items: dict[str, Pairs] = {}
    if row.at is not None:
        pairs += [("gen", gen), ("at", f"{row.at:010d}"), ("stage", row.stage), ("id", row.id)]
    if row.planned:
        text = domain.dumps(json_format.bundle_to_json(row.planned))
        more, extra = domain.lay(name, "b", text, gen)
        pairs += more
        items |= extra
    if row.completion:
        assert row.seq is not None
        text = domain.dumps(json_format.completion_to_json(row.completion))
        more, extra = domain.lay(name, "c", text, gen)
        pairs += [("done", _order(gen, row.seq)), *more]
        if row.completion.failed:
            pairs.append(("fail", _order(gen, row.seq)))
        items |= extra
    items[name] = pairs
    for one, its in items.items():
        # The check precedes the commit, because a committed change cannot be refused.
        check(one, its)
    return items


def _name(gen: str, key: Key) -> str:
    return f"{gen}/{key[0]}/{key[1]}"


def _order(gen: str, seq: int) -> str:
    return f"{gen}/{seq:016d}"


class Rows:
    """Reader of the items of bundles. Calls block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def known(self, gen: str, keys: Sequence[Key]) -> Known:
        """Return which of these bundles exist, and whether each is done."""
        names = {_name(gen, key): key for key in keys}
        found = self._store.select_named("at, done", list(names))
        return {names[name]: "done" in item for name, item in found.items()}

    def folded(
        self,
        gen: str,
        projection: Projection,
        *,
        stage: StageName | None,
        after: int,
        failed: bool,
        page: int,
    ) -> Iterator[BundleRow]:
        """Return the bundles that were folded after the seq `after`, as of `projection`."""
        key = "fail" if failed else "done"
        first, last = _order(gen, max(after + 1, 0)), _order(gen, max(projection.last_seq, 0))
        if after >= projection.last_seq:
            return
        where = f"{key} between {quoted(first)} and {quoted(last)}"
        where += f" and stage = {quoted(stage)}" if stage else ""
        for _, item in self._store.select("*", where, order=key, page=page):
            row = self._row(item)
            if not projection.is_void(row):
                yield row

    def planned(
        self, gen: str, projection: Projection, *, stage: StageName | None
    ) -> list[BundleRow]:
        """Return the bundles that are not folded as of `projection`, by stage and id."""
        where = f"gen = {quoted(gen)} and "
        where += f"stage = {quoted(stage)}" if stage else "stage is not null"
        where += f" and (done is null or done > {quoted(_order(gen, max(projection.last_seq, 0)))})"
        rows = (self._row(item) for _, item in self._store.select("*", where))
        open_ = [row for row in rows if _is_there(row, projection) and not projection.is_void(row)]
        return sorted(open_, key=lambda row: row.key)

    def all(self, gen: str, projection: Projection) -> list[BundleRow]:
        """Return all bundles as of `projection`, including those of void plans."""
        where = f"gen = {quoted(gen)} and stage is not null"
        rows = (self._row(item) for _, item in self._store.select("*", where))
        return [row for row in rows if _is_there(row, projection)]

    def _row(self, item: Item) -> BundleRow:
        planned, completion = self._doc(item, "b"), self._doc(item, "c")
        return BundleRow(
            StageName(item["stage"]),
            BundleId(item["id"]),
            int(item["at"]),
            json_format.bundle_from_json(json.loads(planned)) if planned else None,
            json_format.completion_from_json(json.loads(completion)) if completion else None,
            int(item["done"].partition("/")[2]) if "done" in item else None,
        )

    def _doc(self, item: Item, prefix: str) -> str | None:
        if prefix not in item:
            return None
        text = domain.read(item, prefix, self._store.get_all)
        if text is None:
            raise BackendError(
                f"A bundle in the SimpleDB domain {self._store.domain} lacks a part.",
                remedy="`batchlab ledger rebuild` makes it anew from the bucket.",
            )
        return text


def _is_there(row: BundleRow, projection: Projection) -> bool:
    return row.at is not None and row.at <= projection.at
