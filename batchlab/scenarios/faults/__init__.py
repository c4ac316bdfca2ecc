"""What breaks a grid that is up, for a while: every fault of a scenario, on every backend that it
can exist on."""
