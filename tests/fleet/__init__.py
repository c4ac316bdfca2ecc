"""Tests of `batchlab.fleet`."""
