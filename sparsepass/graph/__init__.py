"""Reads a captured graph and decides nothing."""
