"""Tests of `batchlab.runtime`."""
