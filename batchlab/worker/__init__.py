"""Worker, which receives bundles from its pool's queue, runs them, commits the outcomes, and forwards them."""
