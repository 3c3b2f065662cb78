"""Selecting columns and diagonals."""
