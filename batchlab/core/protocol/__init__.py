"""The protocol as pure functions: names, wire format, sizes, and what follows from an outcome."""
