"""What goes wrong when a budget is to be read from the request."""

from __future__ import annotations

from sparsepass.errors import SparsepassError


class AutoError(SparsepassError, ValueError):
    """A model, cache, router or record that ``auto`` cannot work with; the message says why and what to do."""
