"""The command line."""

from sparsepass.cli.commands import app, main

__all__ = ["app", "main"]
