"""Replay of one task of a job on the user's machine, in the foreground and optionally with a debugger."""
