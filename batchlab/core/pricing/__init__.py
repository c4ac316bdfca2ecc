"""What a grid costs on AWS: price book, estimate, bill. Arithmetic on facts that are handed in."""
