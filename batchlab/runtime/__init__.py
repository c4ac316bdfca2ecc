"""Backends and the processes of a grid: the composition root, the home folder, and settings."""
