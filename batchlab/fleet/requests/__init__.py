"""AWS's Auto Scaling requests over the engine, a file for each kind."""
