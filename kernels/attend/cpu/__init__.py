"""Attention over listed blocks on the CPU."""
