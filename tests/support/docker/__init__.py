"""Docker for tests."""
