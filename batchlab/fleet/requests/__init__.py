"""AWS's Auto Scaling requests over the engine, with one file for each kind."""
