"""The job manager: accepts jobs, plans and cuts stages, collects results, repairs losses, and scales."""
