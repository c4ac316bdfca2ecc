"""Jobs that run again and again: when a schedule is due, and what becomes of each due time."""
