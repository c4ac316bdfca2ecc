"""Measures of the burstiness of arrivals and of the spread of durations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean


def peak_to_mean(times_s: Sequence[float], bucket_s: float) -> float:
    """The busiest bucket over the mean one, of all from the first arrival to the last."""
    first = min(times_s)
    buckets = Counter(int((at - first) // bucket_s) for at in times_s)
    return max(buckets.values()) / (len(times_s) / (max(buckets) + 1))


def cv2(values: Sequence[float]) -> float:
    """Squared coefficient of variation; 1 for the exponential distribution."""
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) / mean**2


def gaps(times_s: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(times_s)]
