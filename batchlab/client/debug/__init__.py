"""Replay of one task of a job on this machine, in the foreground and with a debugger."""
