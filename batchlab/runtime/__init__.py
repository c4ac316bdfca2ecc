"""Backends, home folders, settings, and the start and end of a grid's processes."""
