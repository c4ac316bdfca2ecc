"""Scenes in virtual time."""
