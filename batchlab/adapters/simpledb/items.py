"""Items of jobs and bundles in SimpleDB, and the queries on them.

Invariants: a conditional put of the item of a job commits a change of the job. The put requires the stamp that was read
from the job's item, and writes a new unique stamp. A change writes its other items before the put of the job's item.
The other items count only after the put. If the put contains the other items of the change (`redo`), the next reader or
writer of the job writes the other items.

Writes only add attributes to the item of a bundle. One write plans the bundle, and one write folds the bundle. Each
write of a bundle stores the number of the write in the bundle's item. With the numbers of the writes, a reader sees the
bundles as of its read of the job's item, even if other processes write meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from batchlab.adapters.simpledb import domain
from batchlab.adapters.simpledb.domain import Item, Pairs, Store, check, quote
from batchlab.core.errors import BackendError
from batchlab.core.job_definition import JobDef
from batchlab.core.ledger_projection import BundleRow, Key, Known, Projection
from batchlab.core.model import BundleId, JobId, StageName
from batchlab.core.protocol import json_format


def row_items(gen: str, row: BundleRow) -> dict[str, Pairs]:
    """Return the SimpleDB items to write for a bundle.

    The further items for long texts come before the bundle's own item.
    """
    name = _name(gen, row.key)
    pairs: list[tuple[str, str]] = []
    items: dict[str, Pairs] = {}
    if row.at is not None:
        pairs += [("gen", gen), ("at", f"{row.at:010d}"), ("stage", row.stage), ("id", row.id)]
    if row.planned:
        text = domain.dumps(json_format.bundle_to_json(row.planned))
        more, extra = domain.split(name, "b", text, gen)
        pairs += more
        items |= extra
    if row.completion:
        assert row.seq is not None
        text = domain.dumps(json_format.completion_to_json(row.completion))
        more, extra = domain.split(name, "c", text, gen)
        pairs += [("done", _order(gen, row.seq)), *more]
        if row.completion.failed:
            pairs.append(("fail", _order(gen, row.seq)))
        items |= extra
    items[name] = pairs
    for item_name, its in items.items():
        # The size check precedes the commit, because a committed change cannot be refused.
        check(item_name, its)
    return items


def _name(gen: str, key: Key) -> str:
    return f"{gen}/{key[0]}/{key[1]}"


def _order(gen: str, seq: int) -> str:
    return f"{gen}/{seq:016d}"


class BundleItems:
    """Reader of the items of bundles. Calls of the reader block their thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def known(self, gen: str, keys: Sequence[Key]) -> Known:
        """Return, for each existing bundle of `keys`, whether the bundle is done."""
        names = {_name(gen, key): key for key in keys}
        items = self._store.select_named("at, done", list(names))
        return {names[name]: "done" in item for name, item in items.items()}

    def folded_bundles(
        self, gen: str, projection: Projection, *, stage: StageName | None, after: int, failed: bool, page: int
    ) -> Iterator[BundleRow]:
        """Return the bundles that were folded after the seq `after`, as of `projection`."""
        key = "fail" if failed else "done"
        first, last = _order(gen, max(after + 1, 0)), _order(gen, max(projection.last_seq, 0))
        if after >= projection.last_seq:
            return
        where = f"{key} between {quote(first)} and {quote(last)}"
        where += f" and stage = {quote(stage)}" if stage else ""
        for _, item in self._store.select("*", where, order=key, page=page):
            row = self._row(item)
            if not projection.is_void(row):
                yield row

    def planned_bundles(self, gen: str, projection: Projection, *, stage: StageName | None) -> list[BundleRow]:
        """Return the bundles that are not folded as of `projection`, by stage and id."""
        where = f"gen = {quote(gen)} and "
        where += f"stage = {quote(stage)}" if stage else "stage is not null"
        where += f" and (done is null or done > {quote(_order(gen, max(projection.last_seq, 0)))})"
        rows = (self._row(item) for _, item in self._store.select("*", where))
        open_ = [row for row in rows if _is_there(row, projection) and not projection.is_void(row)]
        return sorted(open_, key=lambda row: row.key)

    def all(self, gen: str, projection: Projection) -> list[BundleRow]:
        """Return all bundles as of `projection`, including the bundles of void plans."""
        where = f"gen = {quote(gen)} and stage is not null"
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
        text = domain.join(item, prefix, self._store.get_all)
        if text is None:
            raise BackendError(
                f"A bundle in the SimpleDB domain {self._store.domain} lacks a part.",
                remedy="`batchlab grid rebuild-ledger` creates the ledger again from the bucket.",
            )
        return text


def _is_there(row: BundleRow, projection: Projection) -> bool:
    return row.at is not None and row.at <= projection.at


NOBODY = "-"
"""Placeholder for an attribute without a value, for example the job's order in an item without a job."""
_STAMP = "v"
_READ_TRIES = 20


@dataclass(frozen=True, slots=True)
class JobItem:
    """Item of a job with the attributes that were read. `projection` is None for an item without a job.

    Each `install` of a job begins a new generation of items. The items of the generation `gen` belong to the current
    state of the job. `gens` lists all generations that may have items.
    """

    name: str
    item: Item
    projection: Projection | None

    @property
    def stamp(self) -> str:
        return self.item[_STAMP]

    @property
    def gen(self) -> str:
        return self.item["now"]

    @property
    def gens(self) -> list[str]:
        return gens_of(self.item)


def unique() -> str:
    """Return a unique random text."""
    return secrets.token_hex(8)


def gens_of(item: Item) -> list[str]:
    """Return the generations named in the item of a job."""
    return [gen for gen in item.get("gens", "").split(",") if gen]


def name_of(job: JobId) -> str:
    return f"job/{job}"


def order_of(job: JobDef) -> str:
    """Return a text that sorts like (submitted_s, id)."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", job.submitted_s))
    bits = bits ^ 0xFFFFFFFFFFFFFFFF if bits >> 63 else bits | 1 << 63
    return f"{bits:016x}/{job.id}"


@lru_cache(256)
def _job_def(text: str) -> JobDef:
    return json_format.job_from_json(json_format.loads(text))


class JobItems:
    """Reader and writer of the items of jobs. Calls of the reader and writer block their thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # --- Reading ----------------------------------------------------------------------------------

    def get(self, job: JobId, *, settle: bool = True) -> JobItem | None:
        """Return the item of the job, or None if the item does not exist.

        With `settle`, complete the writes of the job's last change before reading.
        """
        name = name_of(job)
        for _ in range(_READ_TRIES):
            item = self._store.get(name)
            if item is None:
                return None
            if settle and item.get("redo", NOBODY) != NOBODY and not self._settle(name, item):
                continue
            head = self._read(name, item)
            if head:
                return head
        raise BackendError(
            f"Job {job} in the SimpleDB domain {self._store.domain} lacks a part.",
            remedy="`batchlab grid rebuild-ledger` creates the ledger again from the bucket.",
        )

    def _read(self, name: str, item: Item) -> JobItem | None:
        """Parse the item of a job. Return None if another process has deleted a part of the item meanwhile."""
        if item["okey"] == NOBODY:
            return JobItem(name, item, None)
        job = domain.join(item, "j", self._store.get_all)
        state = domain.join(item, "s", self._store.get_all)
        if job is None or state is None:
            return None
        return JobItem(name, item, Projection.from_json(_job_def(job), json.loads(state)))

    def newest(self, *, active: bool, limit: int, before: JobDef | None) -> list[Projection]:
        """Return at most `limit` jobs that are older than `before`, newest first."""
        key = "live" if active else "okey"
        where = f"{key} > '0'"
        if before:
            where += f" and {key} < {quote(order_of(before))}"
        projections: list[Projection] = []
        for name, item in self._store.select("*", where, order=f"{key} desc", page=limit):
            if len(projections) == limit:
                break
            head = self._read(name, item) or self.get(JobId(name.removeprefix("job/")), settle=False)
            if head and head.projection:
                projections.append(head.projection)
        return projections

    def names(self) -> list[str]:
        """Return the names of all items of jobs, also of items without a job."""
        return [name for name, _ in self._store.select("itemName()", "okey is not null")]

    # --- Changing ---------------------------------------------------------------------------------

    def commit(self, head: JobItem, projection: Projection, rows: Sequence[BundleRow]) -> bool | None:
        """Replace the job's rows by `projection`, and write the bundles `rows`.

        Return False if the job has changed since `head` was read. Return None if it is unknown whether this call
        changed the job, because the answer of SimpleDB was lost and another process has changed the job since.
        """
        gen, stamp = head.gen, unique()
        items = _items_of(gen, rows)
        pairs, extra = self._state(projection, gen, stamp)
        redo: dict[str, Pairs] = {}
        if items:
            redo_pairs, redo = domain.split(f"{gen}/redo/{stamp}", "redo", domain.dumps(items), gen, inline=0)
            pairs += redo_pairs
        else:
            pairs.append(("redo", NOBODY))
        self._store.put_all({**extra, **redo})
        is_ours = self._store.put_if(head.name, pairs, _STAMP, head.stamp)
        if is_ours is False:
            self._store.delete_all([*extra, *redo])
        if not is_ours:
            return is_ours
        if items:
            self._settle(head.name, dict(pairs), items)
        self._store.delete_all(domain.names(head.item, "s"))
        return True

    def install(self, job: JobId, head: JobItem | None, projection: Projection, rows: Sequence[BundleRow]) -> bool:
        """Replace the job and its bundles by `projection` and `rows`.

        Return False if the job has changed since `head` was read.
        """
        name, gen, stamp = name_of(job), unique(), unique()
        current = head.stamp if head else None
        text = domain.dumps(json_format.job_to_json(projection.job))
        spec, items = domain.split(f"{gen}/spec", "j", text, gen)
        state, extra = self._state(projection, gen, stamp)
        items |= {**extra, **_items_of(gen, rows)}
        if items:
            # The job's item names the generation before the other items exist. If this process ends here, another
            # process can find the other items and delete the generation.
            place = [(_STAMP, unique())]
            if head is None:
                place += [("okey", NOBODY), ("live", NOBODY)]
            if not self._store.put_if(name, place, _STAMP, current, more=[("gens", gen)]):
                return False
            current = place[0][1]
            self._store.put_all(items)
        token = _token_name(projection.job.token) if projection.job.token else NOBODY
        pairs = [*state, *spec, ("now", gen), ("redo", NOBODY), ("token", token)]
        is_ours = self._store.put_if(name, pairs, _STAMP, current, more=[("gens", gen)])
        if is_ours is False:
            self.sweep(gen)
        if is_ours and head:
            self._remove_generations(name, head.gens)
        return bool(is_ours)

    def hold(self, job: JobId, head: JobItem | None) -> bool:
        """Change the stamp of an item without a job. Return False if the item has changed since `head` was read.

        The changed stamp makes another process that is about to add the job read the item again.
        """
        pairs = [(_STAMP, unique()), ("okey", NOBODY), ("live", NOBODY)]
        current = head.stamp if head else None
        return bool(self._store.put_if(name_of(job), pairs, _STAMP, current))

    def forget(self, job: JobId) -> None:
        """Delete the job and all of its items."""
        name = name_of(job)
        while head := self.get(job, settle=False):
            stamp = unique()
            pairs = [(_STAMP, stamp), ("okey", NOBODY), ("live", NOBODY), ("redo", NOBODY)]
            if self._store.put_if(name, pairs, _STAMP, head.stamp):
                for gen in head.gens:
                    self.sweep(gen)
                self._release_token(head.item.get("token", NOBODY), job)
                # Another process may have begun to add the job again.
                self._store.delete_if(name, _STAMP, stamp)
                return

    def sweep(self, gen: str) -> None:
        """Delete all items of a generation that does not belong to a job."""
        where = f"gen = {quote(gen)}"
        self._store.delete_all([name for name, _ in self._store.select("itemName()", where)])

    def sweep_lost(self) -> None:
        """Delete the items of all generations that are not named in the item of a job.

        The item of a job names each generation before the generation has items.
        """
        lost = {item["gen"] for _, item in self._store.select("gen", "gen is not null")}
        for _, item in self._store.select("gens", "okey is not null"):
            lost.difference_update(gens_of(item))
        for gen in sorted(lost):
            self.sweep(gen)

    def _remove_generations(self, name: str, gens: Iterable[str]) -> None:
        for gen in gens:
            self.sweep(gen)
            self._store.drop_value(name, "gens", gen)

    def _state(self, projection: Projection, gen: str, stamp: str) -> tuple[list[tuple[str, str]], dict[str, Pairs]]:
        """Return the attributes of a job that change with every write, and further items for long texts."""
        order = order_of(projection.job)
        text = domain.dumps(projection.to_json())
        state, items = domain.split(f"{gen}/state/{stamp}", "s", text, gen)
        live = NOBODY if projection.state.ended else order
        return [(_STAMP, stamp), ("okey", order), ("live", live), *state], items

    # --- Completion of a commit -------------------------------------------------------------------

    def _settle(self, name: str, item: Item, items: Mapping[str, Pairs] | None = None) -> bool:
        """Write the items that the job's last change contains, and then remove the written items from the change.

        Return False if another process has just written the items of the change. A repeated or late write of the items
        of a change does no harm.
        """
        if items is None:
            text = domain.join(item, "redo", self._store.get_all)
            if text is None:
                return False
            items = {key: [(k, v) for k, v in pairs] for key, pairs in json.loads(text).items()}
        self._store.put_all(items)
        self._store.drop_value(name, "redo", item["redo"])
        self._store.delete_all(domain.names(item, "redo"))
        return True

    # --- Tokens -----------------------------------------------------------------------------------

    def claim(self, token: str, job: JobId) -> Projection | None:
        """Bind the client token to this job. Return the job that already has the client token, or None."""
        name, stamp = _token_name(token), unique()
        pairs = [(_STAMP, stamp), ("job", str(job))]
        while True:
            item = self._store.get(name)
            if item is None:
                if self._store.put_if(name, pairs, _STAMP, None):
                    return None
                continue
            if item["job"] == job:
                return None
            other = JobId(item["job"])
            head = self.get(other, settle=False)
            if head and head.projection:
                return head.projection
            if self._store.put_if(name, pairs, _STAMP, item[_STAMP]):
                break
        # The process that claimed the token for `other` may have read the token earlier, and may still add the job
        # `other`.
        while not self.hold(other, head):
            head = self.get(other, settle=False)
            if head and head.projection:
                back = [(_STAMP, unique()), ("job", str(other))]
                self._store.put_if(name, back, _STAMP, stamp)
                return head.projection
        return None

    def _release_token(self, name: str, job: JobId) -> None:
        item = self._store.get(name) if name != NOBODY else None
        if item and item["job"] == job:
            self._store.delete_if(name, _STAMP, item[_STAMP])


def _token_name(token: str) -> str:
    # The name contains a hash of the client token, because a client may use any text as a token.
    return f"token/{hashlib.sha256(token.encode()).hexdigest()}"


def _items_of(gen: str, rows: Iterable[BundleRow]) -> dict[str, Pairs]:
    items: dict[str, Pairs] = {}
    for row in rows:
        items |= row_items(gen, row)
    return items
