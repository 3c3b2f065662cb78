"""Attention over listed blocks."""
