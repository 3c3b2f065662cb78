"""Measure this device: which kernel configurations are fastest, and from where on sparse beats dense.

``sparsepass tune`` is the command, ``python -m sparsepass.measure.tune`` the same with the standard library alone. What
it writes is found at run time; ``docs/benchmarks.md`` says where.
"""
