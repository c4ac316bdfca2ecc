"""Tests of `batchlab.client`."""
