"""What a replay sends to the workers as its jobs' code: this folder, whole."""
