"""AWS for tests: emulators, accounts, stacks, and instances."""
