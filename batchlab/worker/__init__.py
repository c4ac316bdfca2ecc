"""The worker: picks bundles from its pool's queue, runs them in slots, commits and forwards."""
