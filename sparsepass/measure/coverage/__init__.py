"""``sparsepass coverage``: which attention of which architectures is rewritten, and why the rest is not."""
