"""Dynamic Tanh as a torch module."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_dyt.ops import dyt, dyt_fork, dyt_residual, recompute_dyt
from megatron_dyt.ops.backends import BACKENDS
from megatron_dyt.ops.dyt import Options
from megatron_dyt.ops.parameters import check_function, check_groups
from megatron_dyt.ops.reference import Function


class DynamicTanh(nn.Module):
    """A layer in the place of a norm: `weight * f(alpha * x + shift) + bias` (arXiv 2503.10622).

    Unlike a norm it does not rescale its input, so alpha_init has to fit the scale of x.

    Args:
        hidden_size: size of x's dimension `channel_dim`.
        alpha_init: initial alpha, finite and > 0. The paper's default is 0.5; for its language models
            see its tables 10 and 11.
        weight_init: initial weight (gamma) of every channel, finite; 1 in the paper.
        bias: whether to have a bias. The paper's formula does, its LLaMA code does not.
        bias_init: initial bias of every channel, finite; 0 in the paper.
        channel_dim: the dimension of x that weight and bias belong to: -1, or 1 for images (batch, channels,
            height, width). Of `forward`: the other methods take the last one alone.
        function: tanh, erf (Derf, arXiv 2512.10938: adds a learnable shift), hardtanh, sigmoid, isru,
            arctan, satursin, arcsinhclip or identity; or your own, elementwise and of torch operations.
            It should be bounded.
        alpha_groups: how many alphas there are, each for its share of neighbouring channels: 1 as in the
            paper, the number of heads, or "channels" for one each. More than one run without our kernels.
        backend: "auto", "triton" or "torch"; see `megatron_dyt.ops.dyt`.
        device, dtype: of the parameters. x may have another dtype; y has x's.

    Parameters: `alpha` (alpha_groups,); `weight` (hidden_size,), initially 1; `bias` (hidden_size,),
    initially 0, or None; `shift` (1,), initially 0, for erf, else None.
    `replaces` is the norm that `convert_norms` found in its place, None elsewhere; no submodule.

    Raises:
        ValueError: hidden_size < 1, alpha_init not finite or not > 0, weight_init or bias_init not finite,
            unknown function or backend, alpha_groups that do not divide hidden_size.
    """

    bias: nn.Parameter | None
    shift: nn.Parameter | None
    replaces: nn.Module | None = None

    def __init__(
        self,
        hidden_size: int,
        *,
        alpha_init: float = 0.5,
        weight_init: float = 1.0,
        bias: bool = True,
        bias_init: float = 0.0,
        channel_dim: int = -1,
        function: Function = "tanh",
        alpha_groups: int | Literal["channels"] = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}; it must be at least 1")
        if not (math.isfinite(alpha_init) and alpha_init > 0):
            raise ValueError(f"alpha_init is {alpha_init}; it must be finite and > 0 (the default is 0.5)")
        for name, value, papers in (("weight_init", weight_init, 1), ("bias_init", bias_init, 0)):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be finite (the paper's is {papers})")
        check_function(function)
        groups = hidden_size if alpha_groups == "channels" else check_groups(alpha_groups, hidden_size)
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
        self.hidden_size = hidden_size
        self.alpha_init = alpha_init
        self.weight_init = weight_init
        self.bias_init = bias_init
        self.channel_dim = channel_dim
        self.function = function
        self.backend = backend

        def parameter(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        # (1,) and not 0-d: what skips weight decay for 1-D parameters then skips it here too.
        self.alpha = parameter(groups)
        self.weight = parameter(hidden_size)
        self.register_parameter("bias", parameter(hidden_size) if bias else None)
        self.register_parameter("shift", parameter(1) if function == "erf" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values, in place; also after meta-device construction and `to_empty`."""
        self._reset_alpha()
        nn.init.constant_(self.weight, self.weight_init)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.bias_init)
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def _reset_alpha(self) -> None:
        nn.init.constant_(self.alpha, self.alpha_init)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) of any strides -> y of the same shape and dtype, contiguous.

        With a `channel_dim`, x has its hidden_size there, and y is contiguous where x is.
        """
        if self.channel_dim == -1:
            return dyt(x, *self._tensors(), **self._options())
        channels_last = x.movedim(self.channel_dim, -1)
        y = dyt(channels_last, *self._tensors(), **self._options()).movedim(-1, self.channel_dim)
        # As an elementwise function's: what follows may call `view`.
        return y.contiguous() if x.is_contiguous() else y

    def forward_residual(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(self(x + residual), x + residual), both contiguous, in one kernel where there is one."""
        return dyt_residual(x, residual, *self._tensors(), **self._last_dim_options())

    def forward_fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(self(x), x), the gradients of the two added in one kernel: see `dyt_fork`."""
        return dyt_fork(x, *self._tensors(), **self._last_dim_options())

    def recompute(self, y: Tensor, x: Tensor) -> None:
        """Fill y = self(x), whose memory has been freed, again: see `recompute_dyt`."""
        recompute_dyt(y, x, *self._tensors(), **self._last_dim_options())

    def _last_dim_options(self) -> Options:
        if self.channel_dim != -1:
            raise ValueError(
                f"channel_dim is {self.channel_dim}; only forward takes another dimension than the last (-1)"
            )
        return self._options()

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.alpha, self.weight, self.bias

    def _options(self) -> Options:
        return {"function": self.function, "shift": self.shift, "backend": self.backend}

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", self.function)
        return (
            f"{self.hidden_size}, alpha_init={self.alpha_init:g}, weight_init={self.weight_init:g}, "
            f"bias={self.bias is not None}, function={name!r}"
            + (f", alpha_groups={len(self.alpha)}" if len(self.alpha) > 1 else "")
            + (f", channel_dim={self.channel_dim}" if self.channel_dim != -1 else "")
        )
