"""Rows of a projection in the form of `SqlLedger.dump`, so that tests can compare ledgers."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from batchlab.core.ledger_projection import BundleRow, Projection
from batchlab.core.model import Json
from batchlab.core.protocol import json_format


def dumped(jobs: Iterable[tuple[Projection, Iterable[BundleRow]]]) -> dict[str, Json]:
    """Return these jobs with their stages and bundles, sorted."""
    jobs_, stages, bundles = [], [], []
    for projection, rows in jobs:
        jobs_.append(_job(projection))
        stages += _stages(projection)
        bundles += [_bundle(projection, row) for row in rows]
    return {
        "jobs": sorted(jobs_, key=itemgetter("id")),
        "stages": sorted(stages, key=itemgetter("job", "stage")),
        "bundles": sorted(bundles, key=itemgetter("job", "stage", "id")),
    }


def _job(projection: Projection) -> dict[str, Json]:
    return {
        "id": projection.job.id,
        "token": projection.job.token or None,
        "submitted_s": projection.job.submitted_s,
        "spec": json_format.loads(json_format.dumps(json_format.job_to_json(projection.job))),
        "state": projection.state.value,
        "reason": projection.reason,
        "control": projection.control.value,
        "round": projection.round,
        "ended_s": projection.ended_s,
    }


def _stages(projection: Projection) -> list[dict[str, Json]]:
    return [
        {
            "job": projection.job.id,
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
        for position, (name, stage) in enumerate(projection.stages.items())
    ]


def _bundle(projection: Projection, row: BundleRow) -> dict[str, Json]:
    record = row.record(projection.last_seq)
    done = record.completion
    return {
        "job": projection.job.id,
        "stage": row.stage,
        "id": row.id,
        "seq": done is not None,
        "failed": len(done.failed) if done else 0,
        "void": int(projection.is_void(row)),
        "body": json_format.completion_to_json(done)
        if done
        else json_format.bundle_to_json(record.bundle),
    }
