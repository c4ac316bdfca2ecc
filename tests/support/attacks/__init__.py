"""Tools of a simulated attacker for the tests in `tests/attacks`."""
