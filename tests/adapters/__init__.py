"""Tests of `batchlab.adapters`."""
