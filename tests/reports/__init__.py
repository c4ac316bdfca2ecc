"""Tests of `batchlab.reports`."""
