"""What was recorded, as a document in the bucket: a job's part of it, and two parts together.

Invariant: pure; what is made of a document does not depend on who makes it, or when.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from batchlab.core.model import JobId

Doc = dict[str, Any]
"""As `Recorder` keeps it: `pools` by name with `slots`, `type` and the points of their `series`;
`scaling`, `instances` and `workers` as rows; in a job's part `requests` and `duplicates` too."""

BEFORE_S = 5.0
"""A decision may come before the first look at the job that it was made for."""


def part_of(doc: Doc, job: JobId) -> Doc:
    """What of the whole document belongs to a job; an empty part where nothing does."""
    own: Mapping[str, Any] | None = doc["jobs"].get(job)
    earlier: Doc | None = doc["earlier"].get(job)
    if own is None:
        return earlier or empty()
    since_s = own["since_s"]
    mine = {name: pool for name, pool in doc["pools"].items() if name in own["pools"]}
    part = {
        "pools": {
            name: {
                **pool,
                "series": pool["series"][bisect_right(pool["series"], since_s, key=_at) :],
            }
            for name, pool in mine.items()
        },
        "scaling": _decisions(doc["scaling"], mine, since_s - BEFORE_S),
        "instances": {
            name: list(one)
            for name, one in doc["instances"].items()
            if one[0] in mine and (one[6] is None or one[6] >= since_s)
        },
        "workers": {
            name: list(one)
            for name, one in doc["workers"].items()
            if one[1] in mine and one[4] >= since_s
        },
        "requests": list(own["requests"]),
        "duplicates": {
            stage: {kind: list(counted) for kind, counted in kinds.items()}
            for stage, kinds in own["duplicates"].items()
        },
    }
    return together(earlier, part) if earlier else part


def _at(point: Sequence[Any]) -> float:
    return float(point[0])


def _decisions(
    every: Sequence[Sequence[Any]], pools: Collection[str], since_s: float
) -> list[list[Any]]:
    recent = takewhile(lambda one: one[1] > since_s, reversed(every))
    return [list(one) for one in recent if one[0] in pools][::-1]


def empty() -> Doc:
    """Of a job while which nobody looked."""
    return {
        "pools": {},
        "scaling": [],
        "instances": {},
        "workers": {},
        "requests": [],
        "duplicates": {},
    }


def together(a: Doc, b: Doc) -> Doc:
    """Two parts of one job, of which `b` is of a later round."""
    pools = dict(a["pools"])
    for name, pool in b["pools"].items():
        series = [*pools[name]["series"], *pool["series"]] if name in pools else pool["series"]
        pools[name] = {**pool, "series": series}
    duplicates: dict[str, dict[str, list[float]]] = {}
    for one in (a, b):
        for stage, kinds in one["duplicates"].items():
            for kind, (count, slot_s) in kinds.items():
                known = duplicates.setdefault(stage, {}).setdefault(kind, [0, 0.0])
                known[0] += count
                known[1] += slot_s
    workers = dict(a["workers"])
    for name, worker in b["workers"].items():
        first_s = min(worker[3], workers[name][3]) if name in workers else worker[3]
        workers[name] = [*worker[:3], first_s, worker[4]]
    return {
        "pools": pools,
        "scaling": [*a["scaling"], *(one for one in b["scaling"] if one not in a["scaling"])],
        "instances": {**a["instances"], **b["instances"]},
        "workers": workers,
        "requests": [*a["requests"], *b["requests"]],
        "duplicates": duplicates,
    }


def united(a: Doc, b: Doc) -> Doc:
    """Two parts of one job, of two leaders that may have seen the same: nothing of either is lost,
    and nothing counts twice."""
    return {**united_fleets(a, b), **_own(a, b)}


def _own(a: Doc, b: Doc) -> Doc:
    """The same of what is a job's own: requests, duplicates."""
    duplicates = {stage: dict(kinds) for stage, kinds in a["duplicates"].items()}
    for stage, kinds in b["duplicates"].items():
        known = duplicates.setdefault(stage, {})
        for kind, counted in kinds.items():
            before = known.get(kind, [0, 0.0])
            known[kind] = [max(x, y) for x, y in zip(counted, before, strict=True)]
    requests = _growing(_interleaved(a["requests"], b["requests"]))
    return {"requests": requests, "duplicates": duplicates}


def united_fleets(a: Doc, b: Doc) -> Doc:
    """The same of what is no job's own: pools, decisions, instances, workers."""
    pools = dict(a["pools"])
    for name, pool in b["pools"].items():
        seen = pools[name]["series"] if name in pools else []
        pools[name] = {**pool, "series": _interleaved(seen, pool["series"])}
    scaling = [*a["scaling"], *(one for one in b["scaling"] if one not in a["scaling"])]
    instances = dict(a["instances"])
    for name, instance in b["instances"].items():
        instances[name] = max(instances.get(name, instance), instance, key=_how_far)
    workers = dict(a["workers"])
    for name, worker in b["workers"].items():
        other = workers.get(name, worker)
        workers[name] = [*worker[:3], min(worker[3], other[3]), max(worker[4], other[4])]
    return {
        "pools": pools,
        "scaling": sorted(scaling, key=lambda one: float(one[1])),
        "instances": instances,
        "workers": workers,
    }


def _how_far(instance: Sequence[Any]) -> tuple[bool, bool]:
    """How much of an instance's life was seen: its end, that it was in service."""
    return instance[6] is not None, instance[5] is not None


def _interleaved(a: Sequence[Sequence[Any]], b: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The points of `a`, and those of `b` that stand for a time for which `a` has none."""
    found = sorted((list(point) for point in a), key=_at)
    ends = [_at(point) for point in found]
    for point in b:
        end, begin = _at(point), _at(point) - point[1]
        n = bisect_left(ends, end)
        behind = n < len(ends) and (ends[n] == end or ends[n] - found[n][1] < end)
        if not behind and not (n and ends[n - 1] > begin):
            found.insert(n, list(point))
            ends.insert(n, end)
    return found


def _growing(points: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Counts that only grow, by two who had not heard of quite the same."""
    found: list[list[Any]] = []
    for point in points:
        most = found[-1][2:] if found else point[2:]
        found.append([*point[:2], *(max(x, y) for x, y in zip(point[2:], most, strict=True))])
    return found


def joined(a: Doc, b: Doc) -> Doc:
    """Two whole documents, of two leaders: `a` is the other's, `b` ours, whose live jobs count."""
    jobs = {**a["jobs"], **b["jobs"]}
    for job in a["jobs"].keys() & b["jobs"].keys():
        one, other = a["jobs"][job], b["jobs"][job]
        since_s = min(one["since_s"], other["since_s"])
        jobs[job] = {**other, **_own(one, other), "since_s": since_s}
    earlier = {**a["earlier"], **b["earlier"]}
    return {**united_fleets(a, b), "jobs": jobs, "earlier": earlier}
