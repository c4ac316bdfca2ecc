"""Deterministic simulation: the code of the grid on virtual time, under faults chosen by a seed.

Invariant: a simulation is a function of its seed. Two simulations with the same seed write the same event log, byte for
byte.
"""
