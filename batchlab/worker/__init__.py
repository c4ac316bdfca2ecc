"""The worker: receives bundles from its pool's queue, runs, commits, and forwards them."""
