"""DNA, masked bases (Table 6): Caduceus of transformers' Mamba, 0.05M parameters.

No maintained package has Caduceus (arXiv 2403.03234), so it is put together here of transformers' MambaModel:
each mixer reads the sequence in both directions, with its two projections shared; the model reads the
sequence and its reverse complement with the same weights. That computes what the published layers of
Caduceus-PS compute on halves of the channels; Caduceus-Ph would see one strand in training. The norm is
RMSNorm, as published. Not as published: small; a masked base is always the mask token; the head is not the
embedding's transpose; and windows are short, because without CUDA transformers computes Mamba place by place,
in a time quadratic in the length.
"""

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaModel
from transformers.models.mamba.modeling_mamba import MambaMixer

from examples.beyond_llm import genome, genome_metrics
from examples.beyond_llm.domain import Data, Domain, Split

SHAPE = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
LENGTH = 32
MASK = len(genome.BASES)  # the token beside the bases
MASKED = 0.15


class BothWays(nn.Module):
    """A mixer and a second one that reads backwards, with the first one's projections in and out."""

    def __init__(self, mixer: MambaMixer) -> None:
        super().__init__()
        self.forwards = mixer
        self.backwards = MambaMixer(mixer.config, layer_idx=mixer.layer_idx)
        self.backwards.in_proj, self.backwards.out_proj = mixer.in_proj, mixer.out_proj

    def forward(self, hidden_states: Tensor, **options: object) -> Tensor:
        """(sequences, length, hidden) -> the same; the options are a cache and padding, which are none."""
        return self.forwards(hidden_states) + self.backwards(hidden_states.flip(1)).flip(1)


class Caduceus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = SHAPE["hidden_size"]
        # Of unit variance at the start, for both norms (docs/initial-scale.md).
        start = {"initializer_range": hidden**-0.5, "rescale_prenorm_residual": True}
        self.mamba = MambaModel(MambaConfig(vocab_size=MASK + 1, use_cache=False, **SHAPE, **start))
        nn.init.normal_(self.mamba.embeddings.weight)
        for block in self.mamba.layers:
            block.mixer = BothWays(block.mixer)
        self.head = nn.Linear(hidden, len(genome.BASES), bias=False)
        nn.init.normal_(self.head.weight, std=hidden**-0.5)

    def strands(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Of bases (sequences, length): (sequences, length, hidden) of the strand and of its complement.

        Both are in the order of `windows`.
        """
        # Side by side: convert_norms' calibration finds a batch that is doubled in its two halves.
        both = torch.stack([windows, reverse_complement(windows)], 1).flatten(0, 1)
        strand, other = self.mamba(both).last_hidden_state.unflatten(0, (-1, 2)).unbind(1)
        return strand, other.flip(1)

    def features(self, windows: Tensor) -> Tensor:
        """(sequences, length, hidden); of the reverse complement the same, in reverse."""
        strand, other = self.strands(windows)
        return strand + other

    def forward(self, windows: Tensor) -> Tensor:
        """Logits (sequences, length, 4); of the reverse complement those of the complements, in reverse."""
        strand, other = self.strands(windows)
        return self.head(strand) + self.head(other).flip(-1)


def reverse_complement(windows: Tensor) -> Tensor:
    return torch.where(windows == MASK, MASK, MASK - 1 - windows).flip(1)


def loss(model: Caduceus, batch: Data, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the masked bases, in nats."""
    return nn.functional.cross_entropy(*masked(model, batch.inputs[:, 0], generator))


def masked(model: Caduceus, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (masked, 4) and bases (masked,) of the places that the generator chooses."""
    shown = mask(windows, generator)
    hidden = shown == MASK
    return model(shown)[hidden], windows[hidden]


def mask(windows: Tensor, generator: torch.Generator) -> Tensor:
    return windows.masked_fill(torch.rand(windows.shape, generator=generator) < MASKED, MASK)


@torch.no_grad()
def evaluate(model: Caduceus, data: Data, split: Split) -> dict[str, float]:
    predicted = masked(model, data.inputs[:, 0], torch.Generator().manual_seed(0))
    return genome_metrics.measure("masked base", *predicted, model.features, data, split)


DOMAIN = Domain(
    title="Caduceus, a genome's masked bases",
    metrics=genome_metrics.of("masked base"),
    model=Caduceus,
    data=lambda: genome.read(LENGTH, 8192),
    loss=loss,
    evaluate=evaluate,
    call=lambda batch, generator: mask(batch.inputs[:, 0], generator),
    rates=(3e-3, 1e-2),
    steps=100,
    batch=16,
    weight_decay=0.1,
    norm="RMSNorm",
)
