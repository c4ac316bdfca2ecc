"""Attacks on the trust boundary. Each test performs one attack and shows that the grid refuses it."""
