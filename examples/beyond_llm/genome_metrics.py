"""What a model of a genome is measured by: the bases it predicts, and a linear classifier on its features."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.beyond_llm.domain import Data, Split
from examples.beyond_llm.linear_probe import linear_probe

CLASSIFIED = "genome or decoy, accuracy of a linear probe"
WINDOWS = 512  # of the training data


def of(what: str) -> dict[str, tuple[str, bool]]:
    """`Domain.metrics` of a model that predicts `what`, such as "next base"."""
    return {f"{what} loss": ("nats", False), f"{what} accuracy": ("%", True), CLASSIFIED: ("%", True)}


def measure(
    what: str,
    logits: Tensor,
    bases: Tensor,
    features: Callable[[Tensor], Tensor],
    data: Data,
    split: Split,
) -> dict[str, float]:
    """The metrics of `of(what)`, of logits (places, 4) for the bases (places,) that stand there."""
    values = (
        float(nn.functional.cross_entropy(logits, bases)),
        100 * float((logits.argmax(-1) == bases).double().mean()),
        accuracy(features, data, split),
    )
    return dict(zip(of(what), values, strict=True))


def accuracy(features: Callable[[Tensor], Tensor], data: Data, split: Split) -> float:
    """Windows of a genome or decoys, in per cent; chance 50. The features are means over the places."""
    probe = linear_probe()
    probe.fit(*examples(features, split.train.inputs[:WINDOWS]))
    return 100 * float(probe.score(*examples(features, data.inputs)))


def examples(
    features: Callable[[Tensor], Tensor], windows: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features and classes (0 the genome's, 1 a decoy) of windows (windows, 2, length)."""
    found = torch.cat([features(windows[:, i]).mean(1) for i in range(2)])
    return found.numpy(), np.repeat(np.arange(2), len(windows))
