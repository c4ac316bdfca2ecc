"""Runners of tasks for tests."""
