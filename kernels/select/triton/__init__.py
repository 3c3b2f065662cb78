"""Selecting blocks in Triton."""
