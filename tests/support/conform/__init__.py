"""Endpoints that break rules, for the tests of `batchlab conform`."""
