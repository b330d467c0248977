"""What a DyT is made of, and what its operators accept: a clear error, no CUDA fault and no silent cast."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dyt.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def alpha_of_log(log_alpha: Tensor, rate: float, floor: Tensor | None = None) -> Tensor:
    """floor + exp(rate * log_alpha): alpha of a DyT that learns a logarithm. Any shape and dtype to fp32."""
    alpha = (rate * log_alpha.float()).exp()
    return alpha if floor is None else floor + alpha


def check_function(function: object) -> None:
    """Raises ValueError for what is no name of a function, and no function."""
    if not callable(function) and function not in reference.FUNCTIONS:
        raise ValueError(
            f"function is {function!r}; allowed are {', '.join(reference.FUNCTIONS)}, or a callable"
        )


def check_groups(groups: int, hidden: int) -> int:
    """The number of alphas; raises ValueError where it does not divide the channels."""
    if groups < 1 or hidden % groups:
        raise ValueError(
            f"alpha has {groups} values for {hidden} channels; allowed are 1 and what divides {hidden}, "
            "one value for each group of neighbouring channels"
        )
    return groups


class Parameters(NamedTuple):
    """weight * function(alpha * x + shift) + bias, for x of (..., hidden).

    Everything below `dyt.py` takes these as one argument, or spread out in this order (`*parameters`).

    Attributes:
        alpha: (groups,), one for each group of hidden / groups neighbouring channels; (1,) is one for all.
        weight: (hidden,).
        bias: (hidden,) in weight's dtype, or None. No gradient depends on it: backward always has None.
        shift: (1,) for erf, None for the others.
        function: a name of `reference.FUNCTIONS`, or an elementwise function of torch operations.
    """

    alpha: Tensor
    weight: Tensor
    bias: Tensor | None = None
    shift: Tensor | None = None
    function: reference.Function = "tanh"

    @property
    def name(self) -> str:
        """Of the function; one of the caller's own does not come to where it is asked for."""
        assert isinstance(self.function, str)
        return self.function

    def check(self, x: Tensor, residual: Tensor | None = None) -> None:
        """Raises ValueError for a function, shape, dtype or device that does not fit the others."""
        check_function(self.function)
        if (self.shift is not None) != (self.function == "erf"):
            given = "no shift was" if self.shift is None else "a shift was"
            raise ValueError(
                f"{given} given with function={self.function!r}; "
                "give one, of shape (1,), for 'erf' and for nothing else"
            )
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., hidden) with hidden >= 1")
        hidden = x.shape[-1]
        expected = (
            ("x", x, x.shape),
            ("residual", residual, x.shape),
            ("alpha", self.alpha, (check_groups(self.alpha.numel(), hidden),)),
            ("weight", self.weight, (hidden,)),
            ("bias", self.bias, (hidden,)),
            ("shift", self.shift, (1,)),
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
                raise ValueError(
                    f"{name} is on {tensor.device} but x is on {x.device}; move them to one device"
                )
        if self.bias is not None and self.bias.dtype != self.weight.dtype:
            raise ValueError(
                f"bias has dtype {self.bias.dtype} but weight has {self.weight.dtype}; "
                "give both the same dtype"
            )
