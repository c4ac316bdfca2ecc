"""Tests of the docs, the examples, and what is published."""
