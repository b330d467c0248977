"""DNA, next base (Table 6): HyenaDNA, 0.1M parameters.

No maintained package has HyenaDNA, so it is written here from its papers (arXiv 2302.10866, 2306.15794):
blocks of norm, Hyena operator, norm, MLP; the operator is a gated convolution as long as the sequence, whose
filter is an MLP of the place with sine activations, times an exponential decay. Not as published: small; the
head is not the embedding's transpose; one learning rate for all weights, and no dropout.
"""

import math

import torch
from torch import Tensor, nn

from examples.beyond_llm import genome, genome_metrics
from examples.beyond_llm.domain import Data, Domain, Split

HIDDEN, LAYERS, LENGTH = 64, 2, 128
FILTER, BANDS, FREQUENCY = 32, 2, 10.0  # width of the filter's MLP; its 2 * BANDS + 1 inputs; of its sines


class Filter(nn.Module):
    """A filter for each channel, (channels, places), made from the places."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        place = torch.linspace(0, 1, length)[:, None]
        angle = 2 * math.pi * place * torch.linspace(1e-4, BANDS - 1, BANDS)
        self.register_buffer("features", torch.cat([place, angle.cos(), -angle.sin()], 1), persistent=False)
        # To a hundredth after 0.3 of the length in the fastest channel, 1.5 in the slowest.
        rates = torch.linspace(math.log(100) / 1.5, math.log(100) / 0.3, channels)
        self.register_buffer("decay", torch.exp(-place * rates).T.contiguous(), persistent=False)
        self.layers = nn.ModuleList([nn.Linear(2 * BANDS + 1, FILTER), nn.Linear(FILTER, FILTER)])
        self.frequency = nn.Parameter(torch.full((FILTER,), FREQUENCY))
        self.out = nn.Linear(FILTER, channels, bias=False)

    def forward(self) -> Tensor:
        hidden = self.features
        for layer in self.layers:
            hidden = torch.sin(self.frequency * layer(hidden))
        return self.out(hidden).T * self.decay


class Operator(nn.Module):
    """Hyena of order 2: a short convolution of three projections; y = out(x0 · (filter * (x1 · v)))."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.short = nn.Conv1d(3 * HIDDEN, 3 * HIDDEN, 3, padding=2, groups=3 * HIDDEN)
        self.filter = Filter(HIDDEN, LENGTH)
        self.skip = nn.Parameter(torch.randn(HIDDEN))
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """(sequences, length, channels) -> the same; what comes later changes nothing before it."""
        length = x.shape[1]
        first, second, value = self.short(self.project(x).transpose(1, 2))[..., :length].chunk(3, 1)
        value = value * second
        value = convolve(value, self.filter()[:, :length]) + self.skip[:, None] * value
        return self.out((first * value).transpose(1, 2))


def convolve(signal: Tensor, filters: Tensor) -> Tensor:
    """Causal: out[t] = Σ filters[s] · signal[t - s], by FFT. Padded: the end does not come round."""
    length = signal.shape[-1]
    product = torch.fft.rfft(signal, 2 * length) * torch.fft.rfft(filters, 2 * length)
    return torch.fft.irfft(product, 2 * length)[..., :length]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mixer, self.norm2 = nn.LayerNorm(HIDDEN), Operator(), nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(4 * HIDDEN, HIDDEN)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HyenaDNA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(genome.BASES), HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, len(genome.BASES), bias=False)
        for name, module in self.named_modules():
            # Of unit variance at the start, for both norms (docs/initial-scale.md); a filter as torch has it.
            if isinstance(module, nn.Linear) and "filter" not in name:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def features(self, windows: Tensor) -> Tensor:
        """Bases (sequences, length) -> (sequences, length, hidden)."""
        return self.norm(self.blocks(self.embed(windows)))

    def forward(self, windows: Tensor) -> Tensor:
        """Logits (sequences, length, 4) of the base that follows each."""
        return self.head(self.features(windows))


def loss(model: HyenaDNA, batch: Data, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the next base in the genome's windows, in nats."""
    return nn.functional.cross_entropy(*next_bases(model, batch.inputs[:, 0]))


def next_bases(model: HyenaDNA, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (places, 4) and bases (places,) of all places but each window's first."""
    return model(windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten()


@torch.no_grad()
def evaluate(model: HyenaDNA, data: Data, split: Split) -> dict[str, float]:
    predicted = next_bases(model, data.inputs[:, 0])
    return genome_metrics.measure("next base", *predicted, model.features, data, split)


DOMAIN = Domain(
    title="HyenaDNA, a genome's next base",
    metrics=genome_metrics.of("next base"),
    model=HyenaDNA,
    data=lambda: genome.read(LENGTH, 4096),
    loss=loss,
    evaluate=evaluate,
    call=lambda batch, generator: batch.inputs[:, 0],
    rates=(3e-3, 1e-2),
    steps=100,
    batch=16,
    weight_decay=0.1,
)
