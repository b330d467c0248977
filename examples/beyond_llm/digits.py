"""scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, part of the package."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from examples.beyond_llm.domain import Data, Split

IMAGE, CLASSES = 8, 10
VALID, TEST = 300, 397


def read() -> Split:
    """Images float32 (count, 1, 8, 8), mean 0 and std 1 over the training images; labels int64 (count,)."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, IMAGE, IMAGE)
    targets = torch.from_numpy(labels).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train = order[VALID + TEST :]
    images = (images - images[train].mean()) / images[train].std()
    parts = (train, order[:VALID], order[VALID : VALID + TEST])
    return Split(*(Data(images[part], targets[part]) for part in parts))


def cross_entropy(model: nn.Module, batch: Data, generator: torch.Generator) -> torch.Tensor:
    """Loss of a transformers model that classifies images, in nats per image."""
    return nn.functional.cross_entropy(model(batch.inputs).logits, batch.targets)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, split: Split) -> dict[str, float]:
    """Of the class with the highest logit, in per cent."""
    found = model(data.inputs).logits.argmax(-1)
    return {"accuracy": 100 * float((found == data.targets).double().mean())}


@torch.no_grad()
def unit_variance(embeddings: nn.Module, std: float) -> None:
    """Let the embeddings of a transformers ViT keep the variance of standardized pixels, at the start.

    transformers gives all weights one deviation, `std`. What is right for the layers, 1/sqrt(hidden), makes
    of patches of 4 pixels a stream of std 0.25. LayerNorm undoes that, DyT does not (docs/initial-scale.md).
    """
    projection = embeddings.patch_embeddings.projection
    scale = projection.weight[0].numel() ** -0.5 / std
    for each in (projection.weight, embeddings.cls_token, embeddings.position_embeddings):
        each.mul_(scale)
