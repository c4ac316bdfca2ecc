"""Worker, which receives bundles from its pool's queue, runs the bundles, and commits and forwards their outcomes."""
