"""Selecting columns and diagonals in Triton."""
