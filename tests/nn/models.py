"""What is asked of every model of other people's."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_dyt import DynamicTanh, convert_norms, restore_norms

Batch = Mapping[str, Any] | Tensor


class Case(NamedTuple):
    """A small model with random weights, a batch of 2, and what comes of its norms.

    Attributes:
        converted: how many become DyT.
        channels_first: how many of these go over dimension 1.
        left: how many stay, by class.
        unreached: names that the batch does not reach, or not by sequence: not calibrated.
    """

    make: Callable[[], nn.Module]
    batch: Batch
    converted: int
    channels_first: int = 0
    left: Mapping[str, int] = {}
    unreached: tuple[str, ...] = ()


def check(case: Case) -> None:
    """The model converts as said, computes what plain torch computes, and comes back to the bit."""
    model = built(case)
    before, state = outputs(model, case.batch), copy.deepcopy(model.state_dict())
    report = convert_norms(model, alpha_init=0.4)
    dyts = [module for module in model.modules() if isinstance(module, DynamicTanh)]
    assert len(report) == len(dyts) == case.converted
    assert sum(dyt.channel_dim == 1 for dyt in dyts) == case.channels_first
    assert Counter(each.kind for each in report.left) == case.left
    found, expected = outputs(model, case.batch), outputs(with_plain_torch(model), case.batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(new, old) for new, old in zip(found, before, strict=True))

    loaded = built(case)
    converted = model.state_dict()
    convert_norms(loaded, select=lambda name: f"{name}.alpha" in converted)
    loaded.load_state_dict(converted)
    assert_equal(outputs(loaded, case.batch), found)

    restore_norms(model)
    assert_equal(outputs(model, case.batch), before)
    assert_equal(list(model.state_dict().values()), list(state.values()))

    fits = convert_norms(model, case.batch, select=lambda name: name not in case.unreached)
    assert all(fit.error is not None and fit.error < 0.5 for fit in fits)
    outputs(model, case.batch)


def built(case: Case) -> nn.Module:
    """The model, with norms whose weights are not all ones, in eval mode."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        model = case.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


class PlainDyT(nn.Module):
    """The formula, in the dimension that it is given."""

    def __init__(self, dyt: DynamicTanh) -> None:
        super().__init__()
        self.dyt = dyt

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dyt.channel_dim] = self.dyt.hidden_size
        y = self.dyt.weight.view(shape) * torch.tanh(self.dyt.alpha * x)
        return y if self.dyt.bias is None else y + self.dyt.bias.view(shape)

    @property
    def weight(self) -> Tensor:
        return self.dyt.weight


def with_plain_torch(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, DynamicTanh):
                parent._modules[name] = PlainDyT(child)
    return twin


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Every floating-point tensor that the model returns."""
    return list(_tensors(model(batch) if isinstance(batch, Tensor) else model(**batch)))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(new, old) for new, old in zip(found, expected, strict=True))
