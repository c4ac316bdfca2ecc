"""The long-lived processes, and how they come and go: a module for each."""
