"""Tests of `batchlab.scenarios`."""
