"""What the caller says of a request."""
