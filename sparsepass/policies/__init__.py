"""Which budget a request may use."""
