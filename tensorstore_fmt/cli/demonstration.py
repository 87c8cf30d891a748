"""The verb ``demo``: each demonstration is called with its options."""

from __future__ import annotations

from argparse import Namespace

from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import storage_options

__all__ = ["demo"]


def demo(arguments: Namespace, output: Output) -> int:
    """Give the demonstration that was chosen."""
    play = {"attention": _attention, "curves": _curves, "digits": _digits}[arguments.demo]
    return play(arguments, output)


def _digits(arguments: Namespace, output: Output) -> int:
    from tensorstore_fmt.demo import digits  # NumPy and a second process, for this one only

    return digits.run_demo(
        arguments.url,
        steps=arguments.steps,
        save_every=arguments.save_every,
        seed=arguments.seed,
        storage_options=storage_options(arguments),
        pictures=arguments.pictures,
        quiet=arguments.quiet,
        as_json=output.is_json,
    )


def _curves(arguments: Namespace, output: Output) -> int:
    from tensorstore_fmt.demo import curves  # NumPy and other processes, for this one only

    rates = arguments.learning_rates
    return curves.run_demo(
        arguments.url,
        learning_rates=curves.LEARNING_RATES if rates is None else rates,
        steps=arguments.steps,
        save_every=arguments.save_every,
        seed=arguments.seed,
        stop=not arguments.no_stop,
        storage_options=storage_options(arguments),
        pictures=arguments.pictures,
        quiet=arguments.quiet,
        as_json=output.is_json,
    )


def _attention(arguments: Namespace, output: Output) -> int:
    from tensorstore_fmt.demo import attention  # NumPy, and PyTorch if it trains

    return attention.run_demo(
        arguments.url,
        layer=arguments.layer,
        head=arguments.head,
        pair=arguments.pair,
        step=arguments.step,
        token=arguments.token,
        steps=arguments.steps,
        save_every=arguments.save_every,
        seed=arguments.seed,
        storage_options=storage_options(arguments),
        out=arguments.out,
        quiet=arguments.quiet,
        as_json=output.is_json,
    )
