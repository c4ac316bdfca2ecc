"""Runs of a scenario in virtual time, and their comparison with real runs."""
