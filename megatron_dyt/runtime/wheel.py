"""What Megatron expects of a source checkout and the installed wheel does differently."""

from __future__ import annotations

import importlib.util


def skip_helper_build() -> None:
    """Do not run `make` for Megatron's dataset helpers when they are already built.

    The wheel ships the compiled helpers without their Makefile, so Megatron's start-up build exits
    with an error although nothing needs building.
    """
    import megatron.core.datasets.utils as utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = _already_built


def _already_built() -> None:
    """Stands in for `compile_helpers`."""
