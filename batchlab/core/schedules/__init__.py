"""Schedules: repeated jobs, their due times, and the decision about each due time."""
