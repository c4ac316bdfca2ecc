"""Confidence interval of a mean, from 200 resamples. joblib's Parallel calls `resampled_mean` once per resample."""

import random

import joblib

import batchlab.client.joblib  # registers the backend
from batchlab import Grid

WAITS = [3, 5, 8, 13, 2, 34, 7, 6, 21, 4, 9, 11]


def resampled_mean(values: list[int], seed: int) -> float:
    return sum(random.Random(seed).choices(values, k=len(values))) / len(values)


def interval(values: list[int], resamples: int) -> tuple[float, float]:
    """Return the limits between which 95% of the resampled means are."""
    calls = (joblib.delayed(resampled_mean)(values, seed) for seed in range(resamples))
    means = sorted(joblib.Parallel(n_jobs=-1)(calls))
    return means[resamples // 40], means[-resamples // 40]


if __name__ == "__main__":
    with Grid("local") as grid, joblib.parallel_config(batchlab.client.joblib.NAME, grid=grid):
        low, high = interval(WAITS, 200)
    print(f"from {low:.2f} to {high:.2f} minutes")
