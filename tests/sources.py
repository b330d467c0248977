"""Megatron's parser made cheap: a run builds it four times, and each time reads the source of every config
class for the help texts. That was a quarter of a short run."""

from __future__ import annotations

import functools
import inspect


def remember_sources() -> None:
    """From now on `inspect.getsource` looks at a class once in this process."""
    if not hasattr(inspect.getsource, "cache_info"):
        inspect.getsource = functools.cache(inspect.getsource)
