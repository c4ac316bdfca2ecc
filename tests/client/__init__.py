"""Tests of `batchlab.client.http`."""
