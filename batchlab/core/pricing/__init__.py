"""Costs of a grid on AWS: the price book, the estimate, and the bill."""
