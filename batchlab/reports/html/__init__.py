"""Report of a run as one HTML file that does not need a network.

Invariant: DuckDB computes all figures from the run's Parquet files. The same run always produces the same page.
"""
