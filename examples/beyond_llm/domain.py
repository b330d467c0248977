"""What one domain of the comparison consists of. A file of this folder that has a `DOMAIN` is one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """Inputs (count, ...) with targets (count, ...); a domain without labels ignores the targets."""

    inputs: Tensor
    targets: Tensor

    def batch(self, generator: torch.Generator, size: int) -> "Data":
        """`size` different examples."""
        chosen = torch.randperm(len(self.inputs), generator=generator)[:size]
        return Data(self.inputs[chosen], self.targets[chosen])


@dataclass(frozen=True)
class Split:
    """Training data; what the learning rate is chosen on; what is reported."""

    train: Data
    valid: Data
    test: Data


@dataclass(frozen=True)
class Domain:
    """A model, its data and how it is trained, the same for every norm.

    Attributes:
        metrics: {name: (unit, whether higher is better)}; the learning rate is chosen by the first.
        model: makes the model with its own norm, from torch's global random state.
        data: reads the data.
        loss: of a batch, for the training; all its randomness comes from the generator.
        evaluate: the metrics on `Data`; the split is given for what is fitted to the training data.
        rates: learning rates (the peak of the schedule); each norm is reported at its best one.
        select: names of the norms to replace; None for all.
        adapt: what the paper changes besides the norm: gets the model with its norms, and their name.
        after: what follows each step of the optimizer: gets the model and the share of steps done.
        samples: pictures (rows, columns, height, width) that a model made, or real ones for None.
        call: what the model can be called with, of a batch, for a calibration: a tensor, or keyword
            arguments; None: the batch's inputs.
        norm: the model's own one, LayerNorm, RMSNorm or BatchNorm, which is taken out.
    """

    title: str
    metrics: dict[str, tuple[str, bool]]
    model: Callable[[], nn.Module]
    data: Callable[[], Split]
    loss: Callable[[nn.Module, Data, torch.Generator], Tensor]
    evaluate: Callable[[nn.Module, Data, Split], dict[str, float]]
    rates: tuple[float, ...] = (3e-3,)
    steps: int = 150
    batch: int = 64
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    select: Callable[[str], bool] | None = None
    adapt: Callable[[Any, str], None] | None = None
    after: Callable[[Any, float], None] | None = None
    samples: Callable[[Any], Tensor] | None = None
    call: Callable[[Data, torch.Generator], Tensor | dict[str, Any]] | None = None
    norm: str = "LayerNorm"
