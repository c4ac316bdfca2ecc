"""A run's report as one HTML file, which works without a network.

Invariant: all its figures come from DuckDB over the run's Parquet; a run gives one page, always the
same.
"""
