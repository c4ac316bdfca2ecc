"""Report of a run as one HTML file that needs no network.

Invariant: DuckDB computes all figures from the run's Parquet files. The same run always produces the same page.
"""
