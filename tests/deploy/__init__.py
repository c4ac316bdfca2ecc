"""Tests of `batchlab.deploy`."""
