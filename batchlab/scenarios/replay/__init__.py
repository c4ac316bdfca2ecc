"""Runs of a scenario in real time on a real grid."""
