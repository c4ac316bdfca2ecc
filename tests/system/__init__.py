"""Tests with real parts: grids of processes, containers, and services that a test starts."""
