"""Grids of real processes for tests."""
