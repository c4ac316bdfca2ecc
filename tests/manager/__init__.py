"""Tests of `batchlab.manager`."""
