"""Tests of the docs, the examples, and the published files."""
