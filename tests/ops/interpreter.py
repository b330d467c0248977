"""Triton's CPU interpreter, switched on inside a test process that has Triton imported for real."""

import contextlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

from megatron_dyt.ops import triton_dyt


def _interpreted_copy(module: ModuleType) -> ModuleType:
    """A second copy of `module`, whose kernels are interpreted."""
    assert module.__spec__ is not None
    assert module.__spec__.origin is not None
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_interpreted", module.__spec__.origin)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(copy)
    finally:
        triton.knobs.runtime.interpret = before
    return copy


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[ModuleType]:
    """`triton_dyt` with interpreted kernels, so that it takes CPU tensors. Gives the kernels' module.

    An interpreted device function leaves its patches of `triton.language` behind, which would break
    every compilation after it: all is put back here.
    """
    patched: tuple[Any, ...] = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    saved = [(owner, dict(vars(owner))) for owner in patched]
    real = triton_dyt.kernels
    restore_arguments = interpreter.GridExecutor._restore_args_dev
    copy = _interpreted_copy(real)
    try:
        tl.sum = interpreter.InterpretedFunction(tl.sum.fn)
        # It copies CPU tensors onto themselves: seconds for a tensor of 4 GiB.
        interpreter.GridExecutor._restore_args_dev = lambda *args: None
        triton_dyt.kernels = copy
        yield copy
    finally:
        triton_dyt.kernels = real
        interpreter.GridExecutor._restore_args_dev = restore_arguments
        for owner, attributes in saved:
            for name, value in attributes.items():
                if vars(owner).get(name) is not value:
                    setattr(owner, name, value)
            for name in vars(owner).keys() - attributes.keys():
                delattr(owner, name)
