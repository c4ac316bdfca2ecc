"""Tests of `batchlab.cli`."""
