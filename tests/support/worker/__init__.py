"""Runners of tasks for the tests of the worker."""
