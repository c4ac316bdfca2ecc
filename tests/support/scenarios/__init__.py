"""Scenarios, records, and faults for tests."""
