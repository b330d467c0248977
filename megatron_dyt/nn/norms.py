"""Which modules are a LayerNorm or RMSNorm over one dimension: found by trying them, not by their class.

A subclass of nn.LayerNorm may normalize another dimension than the last, or multiply by 1 + weight; a class
of any name may be an RMSNorm. So a copy of the module gets random weights and inputs of several shapes, and
what it returns is compared with

    gain * (x - mean(x)) / std(x) + shift        gain * x / rms(x) + shift

where gain is a tensor of the module, 1 + such a tensor, or nothing, and shift another one, or nothing.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from megatron_dyt.errors import describe
from megatron_dyt.nn.dynamic_tanh import DynamicTanh

# What is known by its class, and why it is left.
_OTHER_NORMS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (
        _BatchNorm,
        "it normalizes over the batch, where DyT costs accuracy (arXiv 2503.10622, Table 16: ResNet-50 falls "
        "from 76.2 % to 68.9 %)",
    ),
    (nn.GroupNorm, "it normalizes groups of channels over all positions; DyT stands for a norm of one token"),
    (_InstanceNorm, "it normalizes each channel over all positions; DyT stands for a norm of one token"),
    ((nn.LocalResponseNorm, nn.CrossMapLRN2d), "it divides each channel by its neighbours alone"),
)
_NEITHER = "it computes neither LayerNorm nor RMSNorm of one dimension"

# A copy's answers are in fp32, or rounded to bf16 (8 bits) a few times; its eps is not known.
_TOLERANCE = 0.02
_MOST_DIMENSIONS = 5
_FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class Formula(NamedTuple):
    """What a copy was found to compute; `gain` and `shift` are names of its tensors."""

    centered: bool
    gain: str | None
    zero_centered: bool
    shift: str | None

    def __call__(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Of x (rows, size)."""
        y = x - x.mean(-1, keepdim=True) if self.centered else x
        y = y / y.square().mean(-1, keepdim=True).sqrt()
        if self.gain is not None:
            y = y * (values[self.gain] + self.zero_centered)
        return y if self.shift is None else y + values[self.shift]


class Norm(NamedTuple):
    """A LayerNorm or RMSNorm over one dimension.

    Attributes:
        size: of that dimension.
        channel_dim: the dimension: -1, or 1.
        gain, shift: fp32 (size,), what the norm multiplies by and adds; None for nothing.
        formula: which of the two, and the names of its tensors.
    """

    size: int
    channel_dim: int
    gain: Tensor | None
    shift: Tensor | None
    formula: Formula


@torch.no_grad()
def without_weight(module: nn.Module, norm: Norm) -> nn.Module:
    """A copy of `module`, which `examine` found to be `norm`, that normalizes in fp32 and does no more."""
    twin = copy.deepcopy(module).float().eval().requires_grad_(False)
    tensors, formula = tensors_of(twin), norm.formula
    if formula.gain is not None:
        tensors[formula.gain].fill_(0.0 if formula.zero_centered else 1.0)
    if formula.shift is not None:
        tensors[formula.shift].zero_()
    return twin


def examine(module: nn.Module, *, batch_norms: bool = False) -> Norm | str | None:
    """The norm that a module is, why DyT cannot take its place, or None for what is no norm.

    batch_norms: whether PyTorch's BatchNorm counts as one, of dimension 1.
    """
    is_torchs = isinstance(module, (nn.LayerNorm, nn.RMSNorm, _BatchNorm, nn.GroupNorm, _InstanceNorm))
    # A container called a norm, such as an adaptive one with a linear layer; the norm inside comes by itself.
    has_layers = any(True for child in module.children() for _ in child.parameters())
    if isinstance(module, DynamicTanh) or (has_layers and not is_torchs):
        return None
    found = _examine(module, batch_norms)
    is_called_norm = is_torchs or "norm" in type(module).__name__.lower()
    return None if isinstance(found, str) and not is_called_norm else found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers of a module itself, by name."""
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    return {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}


def _examine(module: nn.Module, batch_norms: bool) -> Norm | str:
    if batch_norms and isinstance(module, _BatchNorm) and not _bars(module):
        if not type(module).forward.__module__.startswith("torch.nn."):
            return f"{type(module).__name__} has a forward of its own, which may do more than BatchNorm's"
        return _batch_norm(module)
    for kinds, reason in _OTHER_NORMS:
        # FrozenBatchNorm2d of detection models is a module of its own.
        if isinstance(module, kinds) or (kinds is _BatchNorm and "BatchNorm" in type(module).__name__):
            return reason
    if barred := _bars(module):
        return barred
    if inputs := _further_inputs(module):
        return f"its forward takes {', '.join(inputs)} too, and DyT takes x alone"
    tensors = tensors_of(module)
    size = _size(module, tensors)
    if isinstance(size, str):
        return size
    try:
        found = _try(module, size, tensors)
    except Exception as error:  # whatever other people's code raises
        return f"it cannot be tried ({describe(error)})"
    if isinstance(found, str):
        return found
    formula, channel_dim = found
    gain, shift = (
        None if name is None else tensors[name].detach().flatten().float()
        for name in (formula.gain, formula.shift)
    )
    gain = gain + 1 if gain is not None and formula.zero_centered else gain
    return Norm(size, channel_dim, gain, shift, formula)


def _bars(module: nn.Module) -> str | None:
    """Why nothing can be put in the place of a module, whatever it computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if "forward" not in vars(module) and not any(hooks):
        return None
    return "it has hooks, or a forward put over its class's, which DyT would lose; convert before they come"


def _batch_norm(module: _BatchNorm) -> Norm | str:
    if module.num_features < 1:
        return "it does not know its size before a forward pass (LazyBatchNorm)"
    gain, shift = (None if each is None else each.detach().float() for each in (module.weight, module.bias))
    formula = Formula(True, None if gain is None else "weight", False, None if shift is None else "bias")
    return Norm(module.num_features, 1, gain, shift, formula)


def _further_inputs(module: nn.Module) -> list[str]:
    """What `forward` can be called with besides x, such as a gate or a residual."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters[1:] if each.kind not in variadic]


def _size(module: nn.Module, tensors: Mapping[str, Tensor]) -> int | str:
    """The size of the normalized dimension, or why it is not known."""
    shape = getattr(module, "normalized_shape", ())
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(shape) > 1:
        return f"it normalizes the last {len(shape)} dimensions together; DyT takes one"
    sizes = {tensor.numel() for tensor in tensors.values()} or set(shape)
    vectors = all(tensor.numel() == max(tensor.shape, default=0) for tensor in tensors.values())
    if len(sizes) > 1 or len(tensors) > 2 or not vectors:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        return f"it has other tensors than a weight and a bias of one size ({found})"
    if not sizes:
        return "it has no weight and no normalized_shape, which would tell its size"
    if sizes == {1}:
        return "it normalizes a single channel, so that what comes in is lost already"
    return int(sizes.pop())


def _try(norm: nn.Module, size: int, tensors: Mapping[str, Tensor]) -> tuple[Formula, int] | str:
    """What a copy of `norm` computes and the dimension that it normalizes, or why it cannot be said."""
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    twin = copy.deepcopy(norm).requires_grad_(False)
    if device.type == "meta":
        device = torch.device("cpu")
        twin.to_empty(device=device)
    twin.float().eval()
    source = torch.Generator("cpu").manual_seed(0)
    values = {}
    # Whatever the default device and dtype are, which transformers sets while it builds a model.
    with torch.no_grad(), device:
        for name, tensor in tensors_of(twin).items():
            value = torch.rand(size, generator=source, **_FP32).add(0.5).to(device)
            tensor.copy_(value.view_as(tensor))
            values[name] = value
        found: dict[tuple[int, int], Formula] = {}
        # Dimensions of the inputs that give an output of their shape.
        taken: set[int] = set()
        errors = []
        inputs = _inputs(size)
        for x, dim in inputs:
            try:
                y = twin(x.to(device, copy=True))  # which it may change
            except Exception as error:  # a shape that it does not take, or code that cannot run here
                errors.append(error)
                continue
            if isinstance(y, Tensor) and y.shape == x.shape:
                taken.add(x.dim())
            formula = _match(x.to(device), y, dim, values)
            if formula is not None:
                found[x.dim(), dim] = formula
    if not found:
        return f"it cannot be tried ({describe(errors[0])})" if len(errors) == len(inputs) else _NEITHER
    # Of a matrix the last dimension is dimension 1 as well.
    dims = {dim for dimensions, dim in found if dimensions > 2} or {-1}
    # A mean over more than one dimension is one over the last of a matrix.
    if taken - {dimensions for dimensions, _ in found} or len(dims) > 1 or len(set(found.values())) > 1:
        return "what it normalizes depends on the shape of its input"
    return next(iter(found.values())), dims.pop()


def _inputs(size: int) -> list[tuple[Tensor, int]]:
    """Tensors of 2 to 5 dimensions that have `size` in dimension -1 or 1 alone, and that dimension."""
    source = torch.Generator("cpu").manual_seed(1)
    inputs = []
    for dimensions in range(2, _MOST_DIMENSIONS + 1):
        for dim in (-1, 1) if dimensions > 2 else (-1,):
            shape = [2 if size > 2 else 3] * (dimensions - 1)
            shape.insert(1 if dim == 1 else len(shape), size)
            # Mean and std tell the two formulas apart, and make an eps of 0.01 too small to be seen.
            inputs.append((torch.randn(shape, generator=source, **_FP32) * 3 + 2, dim))
    return inputs


def _match(x: Tensor, y: object, dim: int, values: Mapping[str, Tensor]) -> Formula | None:
    """The formula that gives y from x with the weights `values`."""
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    x, y = (each.float().movedim(dim, -1).flatten(0, -2) for each in (x, y))
    atol = _TOLERANCE * float(y.abs().max())
    gains = [(None, False), *((name, less) for name in values for less in (False, True))]
    for centered, (gain, less), shift in itertools.product((False, True), gains, (None, *values)):
        formula = Formula(centered, gain, less, shift)
        # One row tells most formulas from the right one.
        if shift in (None, *({*values} - {gain})) and all(
            torch.allclose(y[:rows], formula(x[:rows], values), _TOLERANCE, atol) for rows in (1, None)
        ):
            return formula
    return None
