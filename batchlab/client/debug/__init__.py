"""One task of a job, brought to this machine and run again in the foreground, under a debugger."""
