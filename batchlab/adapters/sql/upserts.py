"""The statements that insert or else: the one place where SQLite and PostgreSQL differ in spelling.

Invariant: each decides and answers within one statement, so no second writer comes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Insert, Select, and_, bindparam, column, func, or_, select
from sqlalchemy.sql.dml import ReturningInsert

from batchlab.adapters.sql.tables import bundles, counters, jobs, leases

BUNDLE = ("job", "stage", "id", "seq", "failed", "body")
"""The columns of a bundle that are written together."""

NOBODY = ""
"""Owner of a lease that was given back: its row stays, so that its beat never starts again."""


@dataclass(frozen=True, slots=True)
class Upserts:
    """One database's statements. Those that return rows do so for what took effect."""

    add_job: ReturningInsert[Any]
    """Unless the id or the token is taken."""
    plan: Insert
    """Bundles, unless they are there; see `parameters`."""
    complete: ReturningInsert[Any]
    """Bundles that are absent or planned become done; returns their keys. See `parameters`."""
    parameters: Callable[[Sequence[Mapping[str, Any]]], Any]
    """Rows of bundles, each with all of BUNDLE, as what `plan` and `complete` take."""
    take_seqs: ReturningInsert[Any]
    """Reserve `count` sequence numbers; returns the last."""
    take_lease: ReturningInsert[Any]
    """If it is free or the owner's already, or stands at `over_owner` and `over_beat`; returns how
    it stands then."""

    @classmethod
    def of(cls, dialect: str) -> Upserts:
        """For the dialect of that name: "sqlite" or "postgresql"."""
        insert = _insert(dialect)
        plan, complete, parameters = insert(bundles), insert(bundles), _as_they_are
        if dialect == "postgresql":
            # One statement, whose text is always the same, whatever the number of rows.
            plan, complete = (one.from_select(BUNDLE, _unpacked()) for one in (plan, complete))
            parameters = _as_one
        take_seqs = insert(counters).values(name="seq", value=bindparam("count"))
        lease = insert(leases)
        return cls(
            insert(jobs).on_conflict_do_nothing().returning(jobs.c.id),
            plan.on_conflict_do_nothing(),
            complete.on_conflict_do_update(
                index_elements=[*bundles.primary_key],
                set_={name: complete.excluded[name] for name in ("seq", "failed", "body")},
                where=bundles.c.seq.is_(None),
            ).returning(*bundles.primary_key),
            parameters,
            take_seqs.on_conflict_do_update(
                index_elements=[*counters.primary_key],
                set_={"value": counters.c.value + take_seqs.excluded.value},
            ).returning(counters.c.value),
            lease.values({"name": bindparam("name"), "owner": bindparam("owner"), "beat": 1})
            .on_conflict_do_update(
                index_elements=[*leases.primary_key],
                set_={"owner": lease.excluded.owner, "beat": leases.c.beat + 1},
                where=or_(
                    leases.c.owner == lease.excluded.owner,
                    leases.c.owner == NOBODY,
                    and_(
                        leases.c.owner == bindparam("over_owner"),
                        leases.c.beat == bindparam("over_beat"),
                    ),
                ),
            )
            .returning(leases.c.owner, leases.c.beat),
        )


def _insert(dialect: str) -> Callable[..., Any]:
    # Only the one in use is imported. Both have the same methods, but no type in common.
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert
    from sqlalchemy.dialects import sqlite

    return sqlite.insert


def _unpacked() -> Select[Any]:
    """The rows of one parameter, `rows`, which is a text of all of them: the driver writes it
    faster than an array for each column."""
    columns = (column(name, bundles.c[name].type.as_generic()) for name in BUNDLE)
    rows = func.json_to_recordset(bindparam("rows", type_=JSON)).table_valued(*columns)
    return select(rows.render_derived(with_types=True))


def _as_they_are(rows: Sequence[Mapping[str, Any]]) -> Any:
    return rows


def _as_one(rows: Sequence[Mapping[str, Any]]) -> Any:
    return {"rows": rows}
