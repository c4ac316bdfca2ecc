"""Grid on AWS: the locations of its parts, for its instances and for clients elsewhere."""
