"""Attention over listed blocks on Hopper GPUs."""
