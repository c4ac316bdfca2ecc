"""A grid on AWS, seen from a laptop and from its own instances: where its parts are."""
