"""The statements that insert or else: the one place where SQLite and PostgreSQL differ in spelling.

Invariant: each decides and answers within one statement, so no second writer comes in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Insert, bindparam, or_
from sqlalchemy.sql.dml import ReturningInsert

from batchlab.adapters.sql.tables import bundles, counters, jobs, leases


@dataclass(frozen=True, slots=True)
class Upserts:
    """One database's statements. Those that return rows do so for what took effect."""

    add_job: ReturningInsert[Any]
    """Unless the id or the token is taken."""
    plan: Insert
    """Bundles, unless they are there."""
    complete: ReturningInsert[Any]
    """Bundles that are absent or planned become done; returns their keys."""
    take_seqs: ReturningInsert[Any]
    """Reserve `count` sequence numbers; returns the last."""
    take_lease: ReturningInsert[Any]
    """Unless somebody else has it beyond `now_s`."""

    @classmethod
    def of(cls, dialect: str) -> Upserts:
        """For the dialect of that name: "sqlite" or "postgresql"."""
        insert = _insert(dialect)
        complete = insert(bundles)
        take_seqs = insert(counters).values(name="seq", value=bindparam("count"))
        lease = insert(leases)
        return cls(
            insert(jobs).on_conflict_do_nothing().returning(jobs.c.id),
            insert(bundles).on_conflict_do_nothing(),
            complete.on_conflict_do_update(
                index_elements=[*bundles.primary_key],
                set_={name: complete.excluded[name] for name in ("seq", "failed", "body")},
                where=bundles.c.seq.is_(None),
            ).returning(*bundles.primary_key),
            take_seqs.on_conflict_do_update(
                index_elements=[*counters.primary_key],
                set_={"value": counters.c.value + take_seqs.excluded.value},
            ).returning(counters.c.value),
            lease.values({name: bindparam(name) for name in ("name", "owner", "until_s")})
            .on_conflict_do_update(
                index_elements=[*leases.primary_key],
                set_={name: lease.excluded[name] for name in ("owner", "until_s")},
                where=or_(
                    leases.c.owner == lease.excluded.owner,
                    leases.c.until_s <= bindparam("now_s"),
                    # It would outlast two of ours, so the clock has been set back since: nobody
                    # has renewed it, and nobody should wait for the old time to come round.
                    leases.c.until_s
                    > lease.excluded.until_s + lease.excluded.until_s - bindparam("now_s"),
                ),
            )
            .returning(leases.c.name),
        )


def _insert(dialect: str) -> Callable[..., Any]:
    # Only the one in use is imported. Both have the same methods, but no type in common.
    if dialect == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert
    from sqlalchemy.dialects import sqlite

    return sqlite.insert
