"""Tests of `batchlab.worker`."""
