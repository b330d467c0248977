"""What the DyT operators accept: a clear error instead of a CUDA fault or a silent cast."""

import torch
from torch import Tensor

from megatron_dyt.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_function(function: str, shift: Tensor | None) -> None:
    """Raises ValueError for an unknown function, or one with a shift that it has no use for, or without."""
    if function not in reference.FUNCTIONS:
        raise ValueError(f"function is {function!r}; allowed are {', '.join(reference.FUNCTIONS)}")
    if (shift is not None) != (function == "erf"):
        given = "no shift was" if shift is None else "a shift was"
        raise ValueError(
            f"{given} given with function={function!r}; "
            "give one, of shape (1,), for 'erf' and for nothing else"
        )


def check_tensors(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None = None,
) -> None:
    """Raises ValueError for a shape, dtype or device that does not fit x."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., hidden) with hidden >= 1")
    hidden = x.shape[-1]
    expected = (
        ("x", x, x.shape),
        ("residual", residual, x.shape),
        ("alpha", alpha, (1,)),
        ("weight", weight, (hidden,)),
        ("bias", bias, (hidden,)),
        ("shift", shift, (1,)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; for x of shape {tuple(x.shape)} "
                f"it must be {tuple(shape)}"
            )
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name} has dtype {tensor.dtype}; allowed are {allowed}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move them to one device")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(
            f"bias has dtype {bias.dtype} but weight has {weight.dtype}; give both the same dtype"
        )
