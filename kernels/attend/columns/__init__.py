"""Attention over listed blocks and single keys."""
