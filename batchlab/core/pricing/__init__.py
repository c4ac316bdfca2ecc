"""Costs of a grid on AWS: price book, estimate, and bill, as arithmetic on given facts."""
