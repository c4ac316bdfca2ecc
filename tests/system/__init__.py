"""Tests of real parts: grids of processes, containers, services that are started for a test."""
