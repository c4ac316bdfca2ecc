"""Tools of an attacker for the tests in `tests/attacks`."""
