"""Megatron's parsed command line, a global of its own: the only file that touches it."""

import sys
from argparse import Namespace
from collections.abc import Callable

_MODULE = "megatron.training.global_vars"


def parsed_args() -> Namespace | None:
    """What Megatron has parsed; None before that, and in a program without its command line."""
    # Not by an import: where nothing has imported the module, nothing was parsed.
    return getattr(sys.modules.get(_MODULE), "_GLOBAL_ARGS", None)


def set_parsed_args(args: Namespace) -> None:
    """Make `args` Megatron's, without the tokenizer and the loggers that `set_global_variables` starts."""
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = args


def on(*names: str) -> Callable[[object], bool]:
    """Whether any of these settings is switched on in what the function is given, args or a config."""
    return lambda settings: any(bool(getattr(settings, name, None)) for name in names)
