"""A book and its bundles as SqlLedger's `dump` tells of rows, so that ledgers can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from batchlab.adapters.ledger_projection import Book, Row
from batchlab.core.model import Json
from batchlab.core.protocol import json_format


def dumped(jobs: Iterable[tuple[Book, Iterable[Row]]]) -> dict[str, Json]:
    """All of these jobs with their bundles, in whatever order they come."""
    jobs_, stages, bundles = [], [], []
    for book, rows in jobs:
        jobs_.append(_job(book))
        stages += _stages(book)
        bundles += [_bundle(book, row) for row in rows]
    return {
        "jobs": sorted(jobs_, key=itemgetter("id")),
        "stages": sorted(stages, key=itemgetter("job", "stage")),
        "bundles": sorted(bundles, key=itemgetter("job", "stage", "id")),
    }


def _job(book: Book) -> dict[str, Json]:
    return {
        "id": book.job.id,
        "token": book.job.token or None,
        "submitted_s": book.job.submitted_s,
        "spec": json_format.loads(json_format.dumps(json_format.job_to_json(book.job))),
        "state": book.state.value,
        "reason": book.reason,
        "control": book.control.value,
        "round": book.round,
        "ended_s": book.ended_s,
    }


def _stages(book: Book) -> list[dict[str, Json]]:
    return [
        {
            "job": book.job.id,
            "stage": name,
            "position": position,
            "planned": stage.planned,
            "succeeded": stage.succeeded,
            "failed": stage.failed,
            "cancelled": stage.cancelled,
            "retried": stage.retried,
            "run_us": stage.run_us,
            "first_start_s": stage.first_start_s,
            "last_end_s": stage.last_end_s,
            "plan_round": stage.plan_round,
            "cut_seq": stage.cut_seq,
            "uncut": json_format.tasks_to_json(stage.uncut),
        }
        for position, (name, stage) in enumerate(book.stages.items())
    ]


def _bundle(book: Book, row: Row) -> dict[str, Json]:
    record = row.record(book.last_seq)
    done = record.completion
    return {
        "job": book.job.id,
        "stage": row.stage,
        "id": row.id,
        "seq": done is not None,
        "failed": len(done.failed) if done else 0,
        "void": int(book.is_void(row)),
        "body": json_format.completion_to_json(done)
        if done
        else json_format.bundle_to_json(record.bundle),
    }
