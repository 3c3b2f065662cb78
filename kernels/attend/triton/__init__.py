"""Attention over listed blocks in Triton."""
