"""Measures of the burstiness of arrivals and of the spread of durations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean


def peak_to_mean(times_s: Sequence[float], bucket_s: float) -> float:
    """Return the ratio of the busiest bucket to the mean bucket, from the first arrival to the last."""
    first = min(times_s)
    buckets = Counter(int((at - first) // bucket_s) for at in times_s)
    return max(buckets.values()) / (len(times_s) / (max(buckets) + 1))


def cv2(values: Sequence[float]) -> float:
    """Return the squared coefficient of variation, which is 1 for an exponential distribution."""
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) / mean**2


def gaps(times_s: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(times_s)]
