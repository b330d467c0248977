"""Self-distillation (Table 2): DINO with transformers' ViTModel, 0.2M parameters.

The student guesses, from one crop of an image, to which prototypes the teacher assigns another crop of it;
the teacher is a moving average of the student (arXiv 2104.14294). No package has it, so it is written here
from its paper. Not as published: small; the targets are balanced over the batch by Sinkhorn and Knopp's
iteration, as in SwAV (arXiv 2006.09882) and DINOv2 (arXiv 2304.07193), where DINO subtracts a moving mean;
temperatures do not change; crops are large, turned a little, with thicker or thinner strokes and more or
less contrast, in the place of flips, colours and blur. The paper fine-tunes; here the teacher's frozen
features are judged, by their nearest neighbours and by a linear classifier.
"""

import copy
import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTModel

from examples.beyond_llm import digits, mnist
from examples.beyond_llm.domain import Data, Domain, Split
from examples.beyond_llm.linear_probe import linear_probe

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCH = 7
WIDTH, BOTTLENECK, PROTOTYPES = 128, 16, 128  # of the head
GLOBAL, LOCAL = (0.75, 1.0), (0.6, 1.0)  # shares of the image's area that a crop has
LOCALS, LOCAL_SIZE = 2, 14  # crops of each image, and pixels of their sides; there are two global ones, of 28
ASPECT, ROTATION = 1.2, 10.0  # most of width to height and of height to width; most degrees
STROKES, CONTRAST = 0.5, 0.3  # most change: in pixels of a stroke's border, and as a share
STUDENT, TEACHER = 0.1, 0.02  # temperatures
MOMENTUM = 0.95  # of the teacher, at the start; it becomes 1 by a cosine
ROUNDS = 3  # of Sinkhorn and Knopp's iteration
NEIGHBOURS, SHARPNESS = 20, 0.07  # k and the temperature of the votes, as in DINO's evaluation


class Network(nn.Module):
    """ViT and projection head: MLP, length 1, cosines with the prototypes."""

    def __init__(self) -> None:
        super().__init__()
        # Of unit variance at the start, for both norms (docs/initial-scale.md).
        std = SHAPE["hidden_size"] ** -0.5
        image = {"image_size": mnist.IMAGE, "patch_size": PATCH, "num_channels": 1}
        config = ViTConfig(**SHAPE, **image, initializer_range=std)
        self.vit = ViTModel(config, add_pooling_layer=False)
        digits.unit_variance(self.vit.embeddings, std)
        sizes = (SHAPE["hidden_size"], WIDTH, WIDTH, BOTTLENECK)
        first, second, last = (nn.Linear(*pair) for pair in itertools.pairwise(sizes))
        self.head = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
        for layer in (first, second, last):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, BOTTLENECK))

    def features(self, images: Tensor) -> Tensor:
        """The class token behind the last norm, (count, hidden), of images (count, 1, side, side)."""
        smaller = images.shape[-1] != mnist.IMAGE
        return self.vit(images, interpolate_pos_encoding=smaller).last_hidden_state[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """Cosines (count, prototypes)."""
        found = functional.normalize(self.head(self.features(images)), dim=-1)
        # A weight norm whose gains stay 1.
        return found @ functional.normalize(self.prototypes, dim=-1).T


class DINO(nn.Module):
    """A student and its teacher, which start alike; the teacher gets no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Network()
        self.teach()

    def teach(self) -> None:
        """Make the teacher anew, as a copy of the student."""
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines (count, prototypes) by student and teacher."""
        return self.student(images), self.teacher(images)


def crops(images: Tensor, share: tuple[float, float], size: int, generator: torch.Generator) -> Tensor:
    """A part of each image, turned, with other strokes and contrast, (count, 1, size, size).

    What is outside the image is as its background.

    Args:
        share: least and most of the image's area.
    """
    count, background = len(images), images.min()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    area, aspect = uniform(*share), uniform(-math.log(ASPECT), math.log(ASPECT)).exp()
    # Half of the sides, where half of the image's is 1.
    half = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], 1).clamp(max=1)
    center = uniform(-1, 1, 2) * (1 - half)
    angle = uniform(-ROTATION, ROTATION).deg2rad()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    places = torch.cat([turn * half[:, None], center[:, :, None]], 2).to(images)
    grid = functional.affine_grid(places, [count, 1, size, size], align_corners=False)
    found = functional.grid_sample(images - background, grid, align_corners=False)
    thicker, contrast = (uniform(-most, most, 1, 1, 1).to(images) for most in (STROKES, CONTRAST))
    return (1 + contrast) * strokes(found, thicker) + background


def strokes(images: Tensor, thicker: Tensor) -> Tensor:
    """Each image on its way to the largest or, for thicker < 0, to the least of 3 x 3 pixels.

    Args:
        thicker: share of that way, (count, 1, 1, 1), within ±1.
    """
    largest, least = (sign * functional.max_pool2d(sign * images, 3, 1, 1) for sign in (1, -1))
    return images + thicker.abs() * (torch.where(thicker > 0, largest, least) - images)


def assign(cosines: Tensor) -> Tensor:
    """Targets (count, prototypes): each image's sum is 1, and each prototype has the same sum, nearly.

    Sinkhorn and Knopp's iteration from exp(cosines / temperature).
    """
    found = (cosines.double() / TEACHER).exp()
    for _ in range(ROUNDS):
        found = found / found.sum(0)
        found = found / found.sum(1, keepdim=True)
    return found.to(cosines)


def loss(model: DINO, batch: Data, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the student's guess from a crop with the teacher's targets of another, global one.

    The mean over such pairs of crops and over images, in nats; ln(prototypes) is a uniform guess.
    """
    wide = [crops(batch.inputs, GLOBAL, mnist.IMAGE, generator) for _ in range(2)]
    small = [crops(batch.inputs, LOCAL, LOCAL_SIZE, generator) for _ in range(LOCALS)]
    with torch.no_grad():
        targets = [assign(each) for each in model.teacher(torch.cat(wide)).chunk(2)]
    cosines = [*model.student(torch.cat(wide)).chunk(2), *model.student(torch.cat(small)).chunk(LOCALS)]
    guesses = [functional.log_softmax(each / STUDENT, -1) for each in cosines]
    pairs = [(i, j) for i in range(len(targets)) for j in range(len(guesses)) if i != j]
    return torch.stack([-(targets[i] * guesses[j]).sum(-1).mean() for i, j in pairs]).mean()


@torch.no_grad()
def follow(model: DINO, done: float) -> None:
    """Move the teacher towards the student, by less and less; `done` is the share of the training."""
    step = (1 - MOMENTUM) * 0.5 * (1 + math.cos(math.pi * done))
    for old, new in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        old.lerp_(new, step)


@torch.no_grad()
def evaluate(model: DINO, data: Data, split: Split) -> dict[str, float]:
    known, asked = (model.teacher.features(each.inputs) for each in (split.train, data))
    right = neighbours(known, split.train.targets, asked) == data.targets
    probe = linear_probe().fit(known.numpy(), split.train.targets.numpy())
    return {
        "k-NN accuracy": 100 * float(right.double().mean()),
        "linear probe accuracy": 100 * float(probe.score(asked.numpy(), data.targets.numpy())),
        # The same crops at each evaluation.
        "loss between crops": float(loss(model, data, torch.Generator().manual_seed(0))),
    }


def neighbours(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Labels (asked,) by the votes of the nearest `known` features, each with exp(cosine / SHARPNESS)."""
    cosines = functional.normalize(asked, dim=-1) @ functional.normalize(known, dim=-1).T
    nearest, places = cosines.topk(NEIGHBOURS)
    votes = torch.zeros(len(asked), mnist.CLASSES, dtype=cosines.dtype)
    return votes.scatter_add(1, labels[places], (nearest / SHARPNESS).exp()).argmax(1)


DOMAIN = Domain(
    title="DINO, digits without labels",
    metrics={
        "k-NN accuracy": ("%", True),
        "linear probe accuracy": ("%", True),
        "loss between crops": ("nats", False),
    },
    model=DINO,
    data=mnist.read,
    loss=loss,
    evaluate=evaluate,
    # What takes the norms' place is to be the same in both, and the teacher's without gradients.
    adapt=lambda model, method: model.teach(),
    after=follow,
    rates=(8e-3,),
    steps=200,
)
