"""Megatron's parsed arguments without a command line."""

import functools
from argparse import ArgumentParser, Namespace
from typing import Any


def arguments(**given: Any) -> Namespace:
    """Megatron's defaults, but for what is given."""
    return Namespace(**_defaults() | given)


@functools.cache
def _defaults() -> dict[str, Any]:
    from megatron.training.arguments import add_megatron_arguments

    return vars(add_megatron_arguments(ArgumentParser()).parse_args([]))
