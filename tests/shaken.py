"""Models as if trained: what starts at one or zero everywhere would hide a mix-up."""

import torch
from torch import nn


def shaken[M: nn.Module](model: M, by: float = 0.1, buffers: bool = False) -> M:
    """The model, with noise added in place to all that it learns; with `buffers` to those too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(model.buffers() if buffers else ())):
            tensor += by * torch.randn(tensor.shape, generator=generator)
    return model
