"""Tests of `batchlab.core`."""
