"""Measure which budgets are safe: for this model, these tasks, these lengths."""
