"""Diffusion with a class-conditional DiT (Table 3): diffusers' DiTTransformer2DModel, 0.4M parameters.

Pixels take the place of the paper's latents, and a classifier of digits that of the Inception network in the
Fréchet distance.
"""

import functools

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from numpy.typing import NDArray
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from examples.beyond_llm import digits
from examples.beyond_llm.domain import Data, Domain, Split
from megatron_dyt import DynamicTanh

SHAPE = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 4, "patch_size": 2}
SAMPLING_STEPS, SHOWN = 25, 8


def model() -> DiTTransformer2DModel:
    image = {"sample_size": digits.IMAGE, "in_channels": 1, "num_embeds_ada_norm": digits.CLASSES}
    made = DiTTransformer2DModel(**SHAPE, **image)
    for module in made.modules():
        if isinstance(module, LabelEmbedding):
            # Nothing is sampled with guidance, for which labels are left out in training.
            module.dropout_prob = 0.0
        elif isinstance(module, nn.Linear):
            # As in DiT's code; diffusers, made for trained weights, has none of its own.
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return made


def adapt(model: DiTTransformer2DModel, norm: str) -> None:
    """What the paper's patch of DiT leaves out with DyT: modulation and output that start at zero.

    DiT's norms have no gain or bias, and the patch gives DyT none there; ours stay as they start, at 1 and 0
    unless they are fitted.
    """
    if norm == "LayerNorm":
        modulations = [block.norm1.linear for block in model.transformer_blocks]
        for linear in (*modulations, model.proj_out_1, model.proj_out_2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    for module in model.modules():
        if isinstance(module, DynamicTanh):
            module.weight.requires_grad_(False)
            if module.bias is not None:
                module.bias.requires_grad_(False)


@functools.cache
def scheduler() -> DDIMScheduler:
    """1,000 linear betas as in DiT; DDIM's steps, in the place of 250 of DDPM, for sampling."""
    made = DDIMScheduler(clip_sample=False)
    made.set_timesteps(SAMPLING_STEPS)
    return made


def loss(model: DiTTransformer2DModel, batch: Data, generator: torch.Generator) -> Tensor:
    """Mean squared error of the noise, at times and with noise of the generator."""
    noise, noisy = noised(batch, generator)
    return nn.functional.mse_loss(model(**noisy).sample, noise)


def noised(batch: Data, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The noise, and what the model is called with to find it."""
    images = batch.inputs
    times = torch.randint(scheduler().config.num_train_timesteps, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator).to(images)
    noisy = scheduler().add_noise(images, noise, times)
    return noise, {"hidden_states": noisy, "timestep": times, "class_labels": batch.targets}


@torch.no_grad()
def sample(model: DiTTransformer2DModel, labels: Tensor) -> Tensor:
    """Images (count, 1, 8, 8) of the labels (count,), from the same noise for every model."""
    images = torch.randn(
        len(labels), 1, digits.IMAGE, digits.IMAGE, generator=torch.Generator().manual_seed(0)
    )
    for time in scheduler().timesteps:
        noise = model(images, time.expand(len(labels)), class_labels=labels).sample
        images = scheduler().step(noise, time, images).prev_sample
    return images


@functools.cache
def classifier() -> MLPClassifier:
    """Of digits, with one hidden layer; fitted to the training images."""
    train = digits.read().train
    return MLPClassifier((64,), random_state=0, max_iter=500).fit(train.inputs.flatten(1), train.targets)


def features(images: Tensor) -> NDArray[np.float64]:
    """(count, 64): the classifier's hidden layer."""
    hidden = images.flatten(1).double().numpy() @ classifier().coefs_[0] + classifier().intercepts_[0]
    return np.maximum(hidden, 0)


def frechet(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Squared Fréchet distance of the Gaussians with the mean and covariance of each, (count, width)."""
    if not np.isfinite(first).all():
        return float("nan")
    shift = first.mean(0) - second.mean(0)
    one, two = np.cov(first.T), np.cov(second.T)
    # The trace of the product's root: its eigenvalues are real and not negative but for rounding.
    root = np.sqrt(np.linalg.eigvals(one @ two).real.clip(0)).sum()
    return float(shift @ shift + np.trace(one) + np.trace(two) - 2 * root)


@torch.no_grad()
def evaluate(model: DiTTransformer2DModel, data: Data, split: Split) -> dict[str, float]:
    """With as many samples of each class as there are in `data`."""
    images = sample(model, data.targets)
    distance = frechet(features(images), features(data.inputs))
    right = classifier().score(images.flatten(1).nan_to_num(), data.targets)
    # The same noise at each evaluation, ten times an image.
    generator = torch.Generator().manual_seed(0)
    error = torch.stack([loss(model, data, generator) for _ in range(10)]).mean()
    return {"Fréchet distance": distance, "denoising error": float(error), "class as asked": 100 * right}


def samples(model: DiTTransformer2DModel | None) -> Tensor:
    """A row of images for each class, (classes, shown, 8, 8): of the model, or test images without one."""
    labels = torch.arange(digits.CLASSES).repeat_interleave(SHOWN)
    if model is not None:
        images = sample(model, labels)
    else:
        test = digits.read().test
        images = torch.cat([test.inputs[test.targets == label][:SHOWN] for label in range(digits.CLASSES)])
    return images.reshape(digits.CLASSES, SHOWN, digits.IMAGE, digits.IMAGE)


DOMAIN = Domain(
    title="DiT, digits by class",
    metrics={"Fréchet distance": ("", False), "denoising error": ("", False), "class as asked": ("%", True)},
    model=model,
    data=digits.read,
    loss=loss,
    evaluate=evaluate,
    call=lambda batch, generator: noised(batch, generator)[1],
    adapt=adapt,
    samples=samples,
    rates=(1e-2,),
    steps=2000,
    weight_decay=0.0,
)
