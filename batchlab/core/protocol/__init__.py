"""The protocol as pure functions: object keys, JSON format, bundle sizes, and follow-ups."""
