"""Megatron's parser made cheap: a run builds it four times, and each time reads and parses the source of
every config class for the help texts. That was a quarter of a short run."""

import functools
import sys
from typing import Any


def remember() -> None:
    """From now on this process reads a class once; does nothing before Megatron's parser is imported."""
    utils: Any = sys.modules.get("megatron.training.argument_utils")
    if utils is None:
        return
    factory = utils.ArgumentGroupFactory
    read = factory._get_field_docstrings
    if not hasattr(read, "cache_info"):
        texts = functools.cache(functools.partial(read, object.__new__(factory)))
        factory._get_field_docstrings = staticmethod(texts)
