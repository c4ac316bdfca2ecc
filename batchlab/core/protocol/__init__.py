"""Protocol of clients, the manager, and workers: object keys, messages, JSON format, bundle sizes, and follow-ups."""
