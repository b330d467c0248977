"""What benchmarks/kernels.py compares: our kernels and those of others, each as one callable.

A peer that is not installed, or does not work here, is left out, and the report says why.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dyt.ops import dyt, dyt_residual, reference

EPS = 1e-5
Result = Tensor | tuple[Tensor, Tensor]


class Inputs(NamedTuple):
    """Leaves of a call: activations (tokens, hidden) in the measured dtype, parameters (hidden,) or (1,).

    cast_weight: the weight in the measured dtype, as models keep it.
    """

    x: Tensor
    residual: Tensor
    alpha: Tensor
    weight: Tensor
    bias: Tensor
    cast_weight: Tensor


class Peer(NamedTuple):
    """One contestant.

    kind: "dyt" or "rmsnorm". residual: whether it adds a residual first and returns the sum as well.
    make: gives (function of the inputs, parameters that it differentiates), or raises ImportError.
    weight: the input that is its weight.
    """

    name: str
    kind: str
    residual: bool
    make: Callable[[int, torch.dtype], Callable[[Inputs], Result]]
    weight: str = "weight"


def _ours(backend: str) -> Callable[[int, torch.dtype], Callable[[Inputs], Result]]:
    return lambda hidden, dtype: lambda i: dyt(i.x, i.alpha, i.weight, i.bias, backend=backend)


def _ours_residual(backend: str) -> Callable[[int, torch.dtype], Callable[[Inputs], Result]]:
    return lambda hidden, dtype: (
        lambda i: dyt_residual(i.x, i.residual, i.alpha, i.weight, i.bias, backend=backend)
    )


def _plain_dyt(i: Inputs) -> Tensor:
    """As one would write it, with autograd's own backward."""
    t = torch.tanh(i.alpha * i.x.float())
    return (i.weight * t + i.bias).to(i.x.dtype)


def _plain_dyt_residual(i: Inputs) -> tuple[Tensor, Tensor]:
    total = i.x + i.residual
    return _plain_dyt(i._replace(x=total)), total


def _plain_rmsnorm(i: Inputs) -> Tensor:
    return F.rms_norm(i.x, i.cast_weight.shape, i.cast_weight, EPS)


def _plain_rmsnorm_residual(i: Inputs) -> tuple[Tensor, Tensor]:
    total = i.x + i.residual
    return _plain_rmsnorm(i._replace(x=total)), total


def _compiled(
    function: Callable[[Inputs], Result],
) -> Callable[[int, torch.dtype], Callable[[Inputs], Result]]:
    # A compilation for each shape: the best that torch.compile does.
    return lambda hidden, dtype: torch.compile(function, dynamic=False)


def _liger_dyt(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    from liger_kernel.ops.dyt import LigerDyTFunction

    return lambda i: LigerDyTFunction.apply(i.x, i.alpha, i.weight, i.bias)


def _liger_add_rmsnorm(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    # in_place would overwrite the gradient that the next round reads again.
    return lambda i: LigerFusedAddRMSNormFunction.apply(i.x, i.residual, i.weight, EPS, 0.0, "llama", False)


def _quack_rmsnorm(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    from quack import rmsnorm

    return lambda i: rmsnorm(i.x, i.weight, eps=EPS)


def _quack_add_rmsnorm(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    from quack import rmsnorm

    return lambda i: rmsnorm(i.x, i.weight, residual=i.residual, eps=EPS, prenorm=True)


def _te_rmsnorm(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    from transformer_engine.pytorch import RMSNorm

    norm = RMSNorm(hidden, eps=EPS, params_dtype=dtype, device="cuda")
    return lambda i: norm(i.x)


def _te_add_rmsnorm(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    norm = _te_rmsnorm(hidden, dtype)

    def run(i: Inputs) -> tuple[Tensor, Tensor]:
        total = i.x + i.residual
        return norm(i._replace(x=total)), total  # type: ignore[return-value]

    return run


def _apex_rmsnorm(hidden: int, dtype: torch.dtype) -> Callable[[Inputs], Result]:
    from apex.normalization import FusedRMSNorm

    norm = FusedRMSNorm(hidden, eps=EPS).to(device="cuda", dtype=dtype)
    return lambda i: norm(i.x)


PEERS = (
    Peer("dyt", "dyt", False, _ours("auto")),
    Peer("dyt torch", "dyt", False, _ours("torch")),
    Peer("dyt eager", "dyt", False, lambda hidden, dtype: _plain_dyt),
    Peer("dyt torch.compile", "dyt", False, _compiled(_plain_dyt)),
    Peer("dyt liger", "dyt", False, _liger_dyt),
    Peer("rmsnorm torch", "rmsnorm", False, lambda hidden, dtype: _plain_rmsnorm, "cast_weight"),
    Peer("rmsnorm torch.compile", "rmsnorm", False, _compiled(_plain_rmsnorm), "cast_weight"),
    Peer("rmsnorm quack", "rmsnorm", False, _quack_rmsnorm),
    Peer("rmsnorm te", "rmsnorm", False, _te_rmsnorm),
    Peer("rmsnorm apex", "rmsnorm", False, _apex_rmsnorm),
    Peer("add dyt", "dyt", True, _ours_residual("auto")),
    Peer("add dyt eager", "dyt", True, lambda hidden, dtype: _plain_dyt_residual),
    Peer("add dyt torch.compile", "dyt", True, _compiled(_plain_dyt_residual)),
    Peer("add rmsnorm torch", "rmsnorm", True, lambda hidden, dtype: _plain_rmsnorm_residual, "cast_weight"),
    Peer("add rmsnorm torch.compile", "rmsnorm", True, _compiled(_plain_rmsnorm_residual), "cast_weight"),
    Peer("add rmsnorm liger", "rmsnorm", True, _liger_add_rmsnorm),
    Peer("add rmsnorm quack", "rmsnorm", True, _quack_add_rmsnorm),
    Peer("add rmsnorm te", "rmsnorm", True, _te_add_rmsnorm),
)


def exact(peer: Peer, inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    """y and the gradients that the peer should give, in fp64; `upstream` reaches the sum as well."""
    i = Inputs(*(t.detach().double() for t in inputs))
    if peer.residual:
        # All peers round the sum before they use it.
        i = i._replace(x=(inputs.x + inputs.residual).detach().double())
    leaves = {"dx": i.x, "dweight": i.weight}
    if peer.kind == "dyt":
        leaves |= {"dalpha": i.alpha, "dbias": i.bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    if peer.kind == "dyt":
        y = reference.dyt_forward(i.x, i.alpha, i.weight, i.bias)
    else:
        y = F.rms_norm(i.x, i.weight.shape, i.weight, EPS)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), upstream.double()), strict=True))
    if peer.residual:
        found["dx"] = found["dresidual"] = found["dx"] + upstream.double()
    return {"y": y.detach(), **found}
