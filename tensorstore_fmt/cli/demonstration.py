"""The verb ``demo``."""

from __future__ import annotations

from argparse import Namespace

from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import storage_options

__all__ = ["demo"]


def demo(arguments: Namespace, output: Output) -> int:
    """Train a small network into a run and watch it."""
    from tensorstore_fmt.demo import run_demo  # NumPy and a second process, for this verb only

    return run_demo(
        arguments.url,
        steps=arguments.steps,
        save_every=arguments.save_every,
        seed=arguments.seed,
        storage_options=storage_options(arguments),
        pictures=arguments.pictures,
        quiet=arguments.quiet,
        as_json=output.is_json,
    )
