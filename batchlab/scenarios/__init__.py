"""Scenarios: a peak written down, so that any backend can live through it and be judged."""
