"""Selecting blocks by a score and a rule."""
