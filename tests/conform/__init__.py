"""Tests of `batchlab.conform`."""
