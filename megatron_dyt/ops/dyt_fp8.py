"""DyT with FP8 output, whose scale is known beforehand: |DyT(x)| <= max(|weight| + |bias|) for every x.

What quantizes the output of a norm must know its largest magnitude: from earlier steps (delayed scaling,
which a sudden growth overflows) or from a pass of its own (current scaling). DyT's is bounded by its
parameters alone.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_dyt.ops import reference
from megatron_dyt.ops.backends import IMPLEMENTATIONS, choose_implementation
from megatron_dyt.ops.checks import check_function, check_tensors

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
# sup |f| is 1 for these; identity has no bound.
BOUNDED = tuple(name for name in reference.FUNCTIONS if name != "identity")


def fp8_scale(weight: Tensor, bias: Tensor | None) -> Tensor:
    """448 / max(|weight| + |bias|), fp32 of shape (1,): what takes DyT's largest possible output to FP8's."""
    bound = weight.float().abs()
    if bias is not None:
        bound = bound + bias.float().abs()
    # Not to infinity, where all weights are 0.
    return FP8_MAX / bound.amax().clamp_min(1e-30).reshape(1)


def dyt_fp8(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    function: str = "tanh",
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """DyT(x) in FP8 (e4m3) and what to multiply it with: y = y8.float() * scale_inv.

    One kernel on NVIDIA GPUs from Ada and Hopper on. Nothing saturates, whatever x is. The result has no
    gradient: a tensor of dtype float8 cannot have one.

    Args:
        as for `dyt`; any function but identity, which has no bound.

    Returns:
        y8: float8_e4m3fn, contiguous, in x's shape. scale_inv: fp32, (1,).

    Raises:
        ValueError: as `dyt`, and for function="identity".
    """
    check_tensors(x, alpha, weight, bias, shift)
    check_function(function, shift)
    if function not in BOUNDED:
        raise ValueError(
            f"function is {function!r}, whose output has no bound to scale FP8 by; "
            f"allowed are {', '.join(BOUNDED)}"
        )
    implementation = choose_implementation(backend, x.device, function, x.dtype)
    with torch.no_grad():
        y8, scale_inv = torch.ops.megatron_dyt.dyt_fp8.default(
            x, alpha, weight, bias, shift, function, implementation
        )
    return y8, scale_inv


def _kernel(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    function: str,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    scale = fp8_scale(weight, bias)
    forward = IMPLEMENTATIONS[implementation].fp8_forward
    return forward(x, alpha, weight, bias, shift, function, scale), scale.reciprocal()


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=FP8, device=x.device), x.new_empty(1, dtype=torch.float32)


_library = torch.library.Library("megatron_dyt", "FRAGMENT")
_library.define(
    "dyt_fp8(Tensor x, Tensor alpha, Tensor weight, Tensor? bias, Tensor? shift, str function,"
    " str implementation) -> (Tensor, Tensor)"
)
_library.impl("dyt_fp8", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("megatron_dyt::dyt_fp8", _fake, lib=_library)
