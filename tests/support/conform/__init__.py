"""Endpoints that break rules of AWS, for the tests of `batchlab conform`."""
