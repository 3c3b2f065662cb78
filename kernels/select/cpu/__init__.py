"""Selecting blocks on the CPU."""
