"""Runs with data for the tests of reports."""
