"""Measurements, which the command line alone imports."""
