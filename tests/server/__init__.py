"""Tests of `batchlab.server`."""
