"""Speech pre-training (Table 5): transformers' Wav2Vec2ForPreTraining, 0.3M parameters.

The convolutional extractor keeps its norms, as in the paper. Not as published: small; spans of 5 masked
frames (10) and 20 distractors (100), which is easier; the quantizer's temperature stays 1 (2 to 0.5), its
codes start around 0 (between 0 and 1, so all much alike), and each convolution has a norm (the first).
Without the last two a run of this length may stay at the loss of a guess. transformers has no penalty on the
size of the features, which fairseq's loss has.
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from examples.beyond_llm import speech
from examples.beyond_llm.domain import Data, Domain, Split

# Norms stand where the Large model has them (do_stable_layer_norm).
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
POSITIONS = {"num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4}
# A frame is 160 samples, 20 ms at 8 kHz: the published extractor, made for 16 kHz, without its last layer.
EXTRACTOR = {"conv_dim": (32,) * 6, "conv_kernel": (10, 3, 3, 3, 3, 2), "conv_stride": (5, 2, 2, 2, 2, 2)}
NORMS = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
CODES = {"codevector_dim": 32, "proj_codevector_dim": 32, "num_codevectors_per_group": 64}
DROPOUT = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
MASKED, SPAN = 0.65, 5  # of the frames (less, where spans overlap), and frames in a row
DISTRACTORS = 20


def model() -> Wav2Vec2ForPreTraining:
    # A start of unit variance, for both norms (docs/initial-scale.md).
    start = {"initializer_range": SHAPE["hidden_size"] ** -0.5, **dict.fromkeys(DROPOUT, 0.0)}
    config = Wav2Vec2Config(**SHAPE, **POSITIONS, **EXTRACTOR, **NORMS, **CODES, **start)
    made = Wav2Vec2ForPreTraining(config)
    made.set_gumbel_temperature(1.0)
    with torch.no_grad():
        made.quantizer.codevectors.mul_(2).sub_(1)
        # The extractor's features with a mean square of 1, which GELU leaves less.
        made.wav2vec2.feature_extractor.conv_layers[-1].layer_norm.weight.fill_(1.5)
    return made


def losses(model: Wav2Vec2ForPreTraining, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Contrastive loss + 0.1 × diversity loss, in nats per masked frame; and the number of codes in use."""
    asked = masked(clips, generator)
    places = asked["mask_time_indices"]
    negatives = torch.from_numpy(_sample_negative_indices(tuple(places.shape), DISTRACTORS, places.numpy()))
    found = model(**asked, sampled_negative_indices=negatives)
    return found.loss / int(places.sum()), found.codevector_perplexity


def masked(clips: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What the model is called with, but for the distractors. Seeds numpy and torch by the generator."""
    # transformers' masks come from numpy, the quantizer's noise from torch's global state.
    seed = int(torch.randint(2**31, (), generator=generator))
    np.random.seed(seed)
    torch.manual_seed(seed)
    frames = clips.shape[1]
    for kernel, stride in zip(EXTRACTOR["conv_kernel"], EXTRACTOR["conv_stride"], strict=True):
        frames = (frames - kernel) // stride + 1
    places = _compute_mask_indices((len(clips), frames), MASKED, SPAN, min_masks=2)
    return {"input_values": clips, "mask_time_indices": torch.from_numpy(places)}


def loss(model: Wav2Vec2ForPreTraining, batch: Data, generator: torch.Generator) -> Tensor:
    return losses(model, batch.inputs, generator)[0]


@torch.no_grad()
def evaluate(model: Wav2Vec2ForPreTraining, data: Data, split: Split) -> dict[str, float]:
    found, codes = losses(model, data.inputs, torch.Generator().manual_seed(0))
    # In bits, as fairseq logs it.
    return {"pre-training loss": float(found) / math.log(2), "codes in use": float(codes)}


DOMAIN = Domain(
    title="wav2vec 2.0, spoken English",
    # Few codes in use would make a low loss cheap: a distractor that is the right code does not count.
    metrics={"pre-training loss": ("bits", False), "codes in use": ("of 128", True)},
    model=model,
    data=speech.read,
    loss=loss,
    evaluate=evaluate,
    call=lambda batch, generator: masked(batch.inputs, generator),
    rates=(1e-3, 3e-3),
    steps=250,
    batch=8,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    select=lambda name: not name.startswith("wav2vec2.feature_extractor."),
)
