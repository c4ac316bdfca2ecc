"""Scenarios: described workloads that any backend can run and that are judged afterwards."""
