"""Fault injection into a running grid, for every fault that a backend supports."""
