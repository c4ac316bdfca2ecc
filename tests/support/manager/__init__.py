"""Managers without an API for tests."""
