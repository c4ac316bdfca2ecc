"""Tests of `batchlab.jobs`."""
