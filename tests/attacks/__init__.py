"""Attacks on the trust boundary: each test performs one and shows that the grid refuses it."""
