"""Backends and the processes of a grid: composition root, home folder, and settings."""
