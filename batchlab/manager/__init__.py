"""The Job Manager: accepts, plans, collects, repairs, scales and completes; the only leader."""
