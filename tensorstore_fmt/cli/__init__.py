"""The command ``tensorstore-fmt``: look at runs, look after them, take things out of them."""

from tensorstore_fmt.cli.command import main

__all__ = ["main"]
