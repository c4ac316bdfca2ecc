"""Recorded arrivals: readers of the Standard Workload Format, tables of text, and JSON Lines."""
