"""The tags of a grid's instances, by which a worker learns what it is there for."""

POOL_TAG = "batchlab:pool"
SLOTS_TAG = "batchlab:slots"
