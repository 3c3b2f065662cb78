"""Budgets that read the request: a cheap prefill first, and a denser one where its own signs say that it fell short."""
