"""Adapters of the peers. Each adapter module names its class `Adapter`."""
