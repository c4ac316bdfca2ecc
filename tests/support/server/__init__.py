"""Managers with an API and pages for tests."""
