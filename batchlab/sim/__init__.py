"""Deterministic simulation: the grid's own code on virtual time, under faults chosen by a seed.

Invariant: a run is a function of its seed. Two runs write the same event log, byte for byte.
"""
