"""Masked autoencoding (Table 2): transformers' ViTMAEForPreTraining, 0.3M parameters.

The paper fine-tunes; here the encoder is judged by a linear classifier on its frozen features.
"""

import torch
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from examples.beyond_llm import digits
from examples.beyond_llm.domain import Data, Domain, Split
from examples.beyond_llm.linear_probe import linear_probe

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 128,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
}
PATCHES = (digits.IMAGE // 2) ** 2


def model() -> ViTMAEForPreTraining:
    # Of unit variance in the encoder, for both norms (docs/initial-scale.md); the paper's masking,
    # without its norm_pix_loss.
    start = {"initializer_range": SHAPE["hidden_size"] ** -0.5, "mask_ratio": 0.75}
    image = {"image_size": digits.IMAGE, "patch_size": 2, "num_channels": 1}
    made = ViTMAEForPreTraining(ViTMAEConfig(**SHAPE, **DECODER, **start, **image))
    # transformers 5.24.0 zeroes the frozen positions of both: no patch would have a place
    # (findings/transformers_vitmae_positions.sh).
    projection = made.vit.embeddings.patch_embeddings.projection
    projection._is_hf_initialized = False  # Else the next line does nothing.
    made.vit.embeddings.initialize_weights()
    # Their std is that of a matrix of 4 rows and 256 columns, 0.09; this one keeps the pixels' variance.
    torch.nn.init.normal_(projection.weight, std=0.5)
    made.decoder.initialize_weights(PATCHES)
    return made


def loss(model: ViTMAEForPreTraining, batch: Data, generator: torch.Generator) -> Tensor:
    """Mean squared error of the masked patches; the generator chooses these."""
    return model(**call(batch, generator)).loss


def call(batch: Data, generator: torch.Generator) -> dict[str, Tensor]:
    noise = torch.rand(len(batch.inputs), PATCHES, generator=generator)
    return {"pixel_values": batch.inputs, "noise": noise}


@torch.no_grad()
def features(model: ViTMAEForPreTraining, images: Tensor) -> Tensor:
    """(count, hidden): the mean over the patches of whole images, in their order."""
    masked, model.config.mask_ratio = model.config.mask_ratio, 0.0
    try:
        noise = torch.arange(PATCHES).float().expand(len(images), PATCHES)
        return model.vit(images, noise=noise).last_hidden_state[:, 1:].mean(1)
    finally:
        model.config.mask_ratio = masked


@torch.no_grad()
def evaluate(model: ViTMAEForPreTraining, data: Data, split: Split) -> dict[str, float]:
    probe = linear_probe()
    probe.fit(features(model, split.train.inputs).numpy(), split.train.targets.numpy())
    right = probe.score(features(model, data.inputs).numpy(), data.targets.numpy())
    # The same masks at each evaluation, ten an image.
    generator = torch.Generator().manual_seed(0)
    error = torch.stack([loss(model, data, generator) for _ in range(10)]).mean()
    return {"reconstruction error": float(error), "linear probe accuracy": 100 * float(right)}


DOMAIN = Domain(
    title="MAE, digits with three quarters masked",
    metrics={"reconstruction error": ("", False), "linear probe accuracy": ("%", True)},
    model=model,
    data=digits.read,
    loss=loss,
    evaluate=evaluate,
    call=call,
    steps=1000,
    betas=(0.9, 0.95),
)
