"""The command `longspan`."""

from longspan.cli.app import main

__all__ = ["main"]
