"""Ways to train a Transformer without norms, which Table 9 of arXiv 2503.10622 compares DyT with.

Each takes a model with its norms, as it is before training, and changes it in place. They are for layers as
transformers' ViT and MAE have them: norm, then attention or MLP, added to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from megatron_dyt.errors import UserError
from megatron_dyt.nn.convert import find_norms

# The last layer of each residual branch.
ENDS = ("attention.o_proj", "mlp.fc2")
# In front of it, what the branch is a product of; queries and keys only choose what is averaged.
INNER = ("attention.v_proj", "mlp.fc1")
QUERIES = ("attention.q_proj", "attention.k_proj")
OUTPUTS = ("classifier", "decoder.decoder_pred")


class Scaled(nn.Module):
    """factor * layer(x + offset): scalars (1,) that are learned; what is None is left out."""

    def __init__(self, layer: nn.Module, *, factor: float | None = None, offset: float | None = None) -> None:
        super().__init__()
        self.layer = layer
        for name, value in (("factor", factor), ("offset", offset)):
            self.register_parameter(name, None if value is None else nn.Parameter(torch.tensor([value])))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x if self.offset is None else x + self.offset)
        return y if self.factor is None else self.factor * y


class Gain(nn.Module):
    """gamma * weight, with gamma (1,), initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gamma * weight


def skipinit(model: nn.Module) -> None:
    """SkipInit (De and Smith, arXiv 2002.10444): a scalar at each residual branch's end, initially 0.

    So the model starts as its skip connections.
    """
    for stack in stacks(model):
        for layer in stack:
            for name in ENDS:
                layer.set_submodule(name, Scaled(layer.get_submodule(name), factor=0.0))
    remove_norms(model)


@torch.no_grad()
def fixup(model: nn.Module) -> None:
    """Fixup (Zhang, Dauphin and Ma, arXiv 1901.09321): an update's size does not depend on the depth.

    1. The output layer and the last layer of each branch start at 0. 2. The others of a branch are
    multiplied by L^(-1 / (2m - 2)), for L branches of m layers. 3. Each branch has a multiplier, initially 1,
    and a scalar bias, initially 0, before each linear layer. The one before an activation is left out: the
    linear layer in front of it has a bias already. m is 2: values and output, or the two layers of the MLP.
    """
    for stack in stacks(model):
        branches = len(ENDS) * len(stack)
        for layer in stack:
            for name in INNER:
                layer.get_submodule(name).weight *= branches**-0.5
            for name in (*QUERIES, *INNER):
                layer.set_submodule(name, Scaled(layer.get_submodule(name), offset=0.0))
            for name in ENDS:
                end = zeroed(layer.get_submodule(name))
                layer.set_submodule(name, Scaled(end, factor=1.0, offset=0.0))
    for name in OUTPUTS:
        if any(name == each for each, _ in model.named_modules()):
            model.set_submodule(name, Scaled(zeroed(model.get_submodule(name)), offset=0.0))
    remove_norms(model)


def sigma_reparam(model: nn.Module) -> None:
    """σReparam (Zhai et al., arXiv 2303.06296): each weight is gamma / σ(W) * W.

    σ is the largest singular value, by a power iteration with one step per forward pass, and gamma a scalar,
    initially 1. For every linear layer and the convolution that embeds the patches.
    """
    stacks(model)
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            spectral_norm(module)
            register_parametrization(module, "weight", Gain())
    remove_norms(model)


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "SkipInit": skipinit,
    "Fixup": fixup,
    "sigmaReparam": sigma_reparam,
}


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers, each with a residual stream of its own."""
    found = list(_stacks(model))
    if not found:
        raise UserError(
            f"{type(model).__name__} has no layers like transformers' ViT, which SkipInit, Fixup and "
            "σReparam are made for here: use them with vit and mae, and --methods DyT elsewhere"
        )
    return found


def _stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            names = {name for name, _ in module[0].named_modules()}
            if names.issuperset((*ENDS, *INNER, *QUERIES)):
                yield module


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def remove_norms(model: nn.Module) -> None:
    for name in find_norms(model)[0]:
        model.set_submodule(name, nn.Identity())
